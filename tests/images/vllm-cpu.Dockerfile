# CPU vLLM from the project's lock, in the place of vllm/vllm-openai-cpu. The wheels come in as the
# build context "wheels" (fetched by tests/images/build with the machine's own pip configuration).
ARG BASE
FROM $BASE
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 -m pip install --quiet --no-index --find-links /wheels --no-deps --root-user-action=ignore \
        uv \
    && uv pip install --quiet --system --break-system-packages --no-index --find-links /wheels --no-deps \
        --no-cache --compile-bytecode --requirement /wheels/lock.txt \
    && python3 -c 'import vllm, torch, sys; print(vllm.__version__, torch.__version__)'
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
