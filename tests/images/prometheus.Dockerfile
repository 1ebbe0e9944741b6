# Debian's Prometheus where the official image has it: /bin/prometheus, /bin/promtool, busybox, nobody.
ARG BASE
FROM $BASE
COPY *.deb /tmp/
RUN for deb in /tmp/*.deb; do dpkg --extract "$deb" /; done \
    && rm -rf /tmp/*.deb /etc/prometheus/* /usr/share/doc \
    && ln -s busybox /usr/bin/wget \
    && /bin/prometheus --version && /bin/promtool --version \
    && install -d -o nobody -g nogroup /prometheus
USER nobody
WORKDIR /prometheus
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
