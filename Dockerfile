# A server for the checkpoints in /checkpoints: the default ones, or those mounted there.
#   docker build -t topkapi --build-arg TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" .
#   docker run --rm --read-only --tmpfs /tmp -p 8000:8000 topkapi
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Extra pip arguments for torch alone: the CPU-only index keeps CUDA libraries (gigabytes) out of the image.
ARG TORCH_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# What serving needs, at the locked versions, in layers that a change of our own code leaves alone.
RUN python -m venv /opt/topkapi \
 && /opt/topkapi/bin/pip install --no-deps "$(grep '^torch==' requirements.lock)" ${TORCH_ARGS}
RUN /opt/topkapi/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print('\n'.join(p['dependencies'] + p['optional-dependencies']['gguf'] + ['setuptools']))" > serving.txt \
 && /opt/topkapi/bin/pip install -r serving.txt -c requirements.lock
COPY README.md LICENSE ./
COPY model model
COPY service service
COPY training training
RUN /opt/topkapi/bin/pip install --no-deps --no-build-isolation .

FROM ${BASE}
# The environment keeps the path it was made at. Nothing is written but below /tmp.
COPY --from=build /opt/topkapi /opt/topkapi
COPY --chown=10001:10001 checkpoints /checkpoints
ENV PATH=/opt/topkapi/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TOPKAPI_CHECKPOINTS=/checkpoints \
    HOME=/tmp XDG_CACHE_HOME=/tmp/cache HF_HOME=/tmp/cache/huggingface GRADIO_TEMP_DIR=/tmp/gradio \
    GRADIO_ANALYTICS_ENABLED=False MPLCONFIGDIR=/tmp/matplotlib TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
CMD ["topkapi", "serve", "--host", "0.0.0.0"]
