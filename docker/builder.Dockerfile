# The builder: runs once and exits. Build from the repository's root:
#   docker build --file docker/builder.Dockerfile --tag knnlm-builder .
#   docker build --file docker/builder.Dockerfile --build-arg FAISS=gpu --tag knnlm-builder-gpu .
# The default index's torch brings CUDA libraries; --build-arg PIP_EXTRA_INDEX_URL=… names an index with CPU builds.
FROM python:3.11.14-slim-bookworm AS install
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# cpu, or gpu: there must be exactly one FAISS.
ARG FAISS=cpu
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
RUN pip install --quiet -c constraints.txt --no-build-isolation ".[${FAISS},gguf,plot]"

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="knnlm builder" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home knnlm
COPY --from=install /opt/knnlm /opt/knnlm
# The root file system may be read-only: what libraries insist on writing goes to /tmp. Models are mounted, never fetched.
ENV PATH=/opt/knnlm/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
# It serves nobody; its exit status says how it went.
HEALTHCHECK NONE
ENTRYPOINT ["knnlm"]
CMD ["build", "--help"]
