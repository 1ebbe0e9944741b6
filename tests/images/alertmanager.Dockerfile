# Debian's Alertmanager where the official image has it: /bin/alertmanager, /bin/amtool, busybox, nobody.
ARG BASE
FROM $BASE
COPY *.deb /tmp/
RUN for deb in /tmp/*.deb; do dpkg --extract "$deb" /; done \
    && rm -rf /tmp/*.deb /etc/prometheus /usr/share/doc \
    && ln -s busybox /usr/bin/wget \
    && ln -s prometheus-alertmanager /usr/bin/alertmanager \
    && /bin/alertmanager --version && /bin/amtool --version \
    && install -d -o nobody -g nogroup /alertmanager /etc/alertmanager
USER nobody
WORKDIR /alertmanager
VOLUME /alertmanager
ENTRYPOINT ["/bin/alertmanager"]
