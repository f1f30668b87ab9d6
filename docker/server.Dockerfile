# The server; with the extra `playground` also the page. Build from the repository's root:
#   docker build --file docker/server.Dockerfile --tag knnlm-server .
#   docker build --file docker/server.Dockerfile --build-arg FAISS=gpu --tag knnlm-server-gpu .
#   docker build --file docker/server.Dockerfile --build-arg EXTRAS=gguf,playground --tag knnlm-playground .
# The default index's torch brings CUDA libraries; --build-arg PIP_EXTRA_INDEX_URL=… names an index with CPU builds.
FROM python:3.11.14-slim-bookworm AS install
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# cpu, or gpu: there must be exactly one FAISS.
ARG FAISS=cpu
ARG EXTRAS=gguf,otel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/knnlm
ENV PATH=/opt/knnlm/bin:$PATH
WORKDIR /source
# Apart from our own files: what changes seldom is installed once.
COPY constraints.txt ./
RUN pip install --quiet -c constraints.txt torch hatchling
COPY pyproject.toml README.md LICENSE ./
COPY core ./core
COPY datastore_builder ./datastore_builder
COPY server ./server
COPY cli ./cli
COPY clients ./clients
RUN pip install --quiet -c constraints.txt --no-build-isolation ".[${FAISS},${EXTRAS}]" ./clients/python

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="knnlm server" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home knnlm
COPY --from=install /opt/knnlm /opt/knnlm
# The root file system may be read-only: what libraries insist on writing goes to /tmp. Models are mounted, never fetched.
ENV PATH=/opt/knnlm/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 HEALTH_URL=http://127.0.0.1:8000/health
USER 10001
EXPOSE 8000
# Asks past any proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-ISc", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["knnlm"]
CMD ["serve", "--help"]
