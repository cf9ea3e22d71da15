# One image for every CALM process; compose chooses the command. `--target gpu` has the CUDA build of ONNX Runtime.
FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 calm \
    && mkdir -p /data/knowledge /data/models \
    && chown -R calm:calm /data
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY shared shared
COPY fleets fleets
ENV CALM_HOME=/data CALM_MODELS_DIR=/data/models

FROM base AS cpu
RUN pip install ".[cpu]"
USER calm

# CUDA 13 and cuDNN 9 as Python packages, found by onnxruntime.preload_dlls().
FROM base AS gpu
RUN pip install ".[gpu]" "onnxruntime-gpu[cuda,cudnn]"
USER calm
