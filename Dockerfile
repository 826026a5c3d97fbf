# A server for the checkpoints in /checkpoints: the default ones, or those mounted there.
#   docker build -t topkapi .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 topkapi
# Who publishes its port elsewhere gives it a key: -e TOPKAPI_API_KEY=… (topkapi key new NAME prints one), or a file of
# them: -v ./keys:/keys:ro -e TOPKAPI_KEYS=/keys
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# pip arguments that choose a build of torch. Without any it is the CPU build, where its index answers; for NVIDIA GPUs
# "--extra-index-url https://download.pytorch.org/whl/cu130", which adds gigabytes.
ARG TORCH_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml requirements.lock install_torch.py ./
# The native core is compiled where there is a compiler; without one PyTorch computes, and serving is slower.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ >/dev/null || echo "no compiler: no native core"
# What serving needs, at the locked versions, in layers that a change of our own code leaves alone.
RUN python -m venv /opt/topkapi \
 && /opt/topkapi/bin/python install_torch.py ${TORCH_ARGS}
RUN /opt/topkapi/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print('\n'.join(p['dependencies'] + p['optional-dependencies']['gguf'] + ['setuptools']))" > serving.txt \
 && /opt/topkapi/bin/pip install -r serving.txt -c requirements.lock
COPY README.md LICENSE setup.py ./
COPY topkapi topkapi
COPY model model
COPY engine engine
COPY service service
COPY training training
COPY python python
RUN /opt/topkapi/bin/pip install --no-deps --no-build-isolation .
# Almost half of it is never read by a server: headers, test suites, programs of other packages, pip itself, and the names
# of PyTorch's inner functions, which debuggers read.
RUN cd "$(/opt/topkapi/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && rm -rf torch/test torch/include torch/share/cmake pip pip-*.dist-info \
 && if command -v strip >/dev/null; then strip --strip-unneeded torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so; fi \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find . -type d -name tests -prune -exec rm -rf {} +

FROM ${BASE}
# The environment keeps the path it was made at. Nothing is written but below /tmp. Every interface of a container is its
# own, and reached by whom its port is published to: without keys it serves those, and says so (TOPKAPI_INSECURE).
COPY --from=build /opt/topkapi /opt/topkapi
COPY --chown=10001:10001 checkpoints /checkpoints
ENV PATH=/opt/topkapi/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TOPKAPI_CHECKPOINTS=/checkpoints TOPKAPI_INSECURE=true \
    HOME=/tmp XDG_CACHE_HOME=/tmp/cache HF_HOME=/tmp/cache/huggingface GRADIO_TEMP_DIR=/tmp/gradio \
    GRADIO_ANALYTICS_ENABLED=False MPLCONFIGDIR=/tmp/matplotlib TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
CMD ["topkapi", "serve", "--host", "0.0.0.0"]
