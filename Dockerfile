# syntax=docker/dockerfile:1
# The HTTP service of one run, on a CPU. Build: docker build -t crossx .
# Run: docker run --rm -p 127.0.0.1:8000:8000 -v ./runs/mine:/model:ro crossx     (compose.yaml does it with all locks)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/crossx
ENV PATH=/opt/crossx/bin:$PATH
# PyPI's torch for Linux brings gigabytes of CUDA libraries; this index has the same without them.
RUN pip install "torch>=2.10" "torchvision>=0.25" --index-url https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
# what is installed has its version in pyproject.toml
# hadolint ignore=DL3013
RUN pip install ".[serve]" && python -m compileall -q /opt/crossx/lib

FROM python:${PYTHON}-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin crossx
COPY --from=build /opt/crossx /opt/crossx
# Nothing is written but under /tmp: matplotlib's cache of fonts, and logs of defects.
ENV PATH=/opt/crossx/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["crossx", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
