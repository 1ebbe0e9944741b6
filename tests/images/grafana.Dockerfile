# NOT Grafana: a stand-in that answers Grafana's health check, so that the compose file can be
# tested where no registry answers. It draws nothing and reads no dashboard.
ARG BASE
FROM $BASE
LABEL org.opencontainers.image.title="not Grafana" \
      org.opencontainers.image.description="answers /api/health only; for tests of docker-compose.yml"
COPY not_grafana.py /opt/not_grafana.py
RUN ln -s busybox /usr/bin/wget && install -d -o 472 -g 0 /var/lib/grafana
USER 472:0
VOLUME /var/lib/grafana
ENTRYPOINT ["python3", "/opt/not_grafana.py"]
