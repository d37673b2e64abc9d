# raylivecell and Ray on PATH: for the command line, for nodes of a Ray cluster (KubeRay too); job scripts in /app/jobs.
#   docker build -t raylivecell:0.1.0-cpu .
#   docker build --build-arg ACCELERATOR=cuda -t raylivecell:0.1.0-cuda .
# For a reproducible base image: --build-arg PYTHON_DIGEST=@sha256:..., printed by `docker buildx imagetools inspect`.
ARG PYTHON_TAG=3.11.15-slim-trixie
ARG PYTHON_DIGEST=

# A wheel of each dependency. An empty package takes the project's place, so that code changes keep this layer cached.
FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS wheels
ARG ACCELERATOR=cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first and from one index only: PyPI's build includes CUDA; PyTorch's CPU index has a version +cpu, which the
# second command prefers to PyPI's.
RUN case "$ACCELERATOR" in \
      cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;; \
      cuda) index="" ;; \
      *) echo "ACCELERATOR must be cpu or cuda, not '$ACCELERATOR'" >&2; exit 2 ;; \
    esac \
    && pip wheel --no-cache-dir --no-deps $index -c constraints.txt --wheel-dir /wheels torch
RUN pip install --no-cache-dir -c constraints.txt setuptools \
    && mkdir raylivecell && touch raylivecell/__init__.py \
    && pip wheel --no-cache-dir --no-build-isolation --find-links /wheels -c constraints.txt --wheel-dir /wheels . \
    && rm /wheels/raylivecell-*.whl

# The package itself, built with the setuptools of the stage above.
FROM wheels AS package
COPY raylivecell/ raylivecell/
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /dist .

# The runtime image: no compiler, no package index, no root. The wheels need only glibc, libstdc++, libgcc and zlib, all
# in the slim image; wget is for KubeRay's probes and submitters.
FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash ray
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl
RUN --mount=type=bind,from=package,source=/dist,target=/dist \
    pip install --no-cache-dir --no-index --no-deps /dist/*.whl && pip check
WORKDIR /app
COPY jobs/ jobs/
# No thread counts here: Ray sets OMP_NUM_THREADS of each worker to its number of CPUs.
ENV HOME=/home/ray \
    GOMP_SPINCOUNT=10000 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
# A node is healthy while its raylet answers; a container without Ray is healthy while it runs.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD test ! -S /tmp/ray/session_latest/sockets/raylet \
        || wget -q -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="raylivecell" \
      org.opencontainers.image.description="U-Net segmentation of living cells (LIVECell) trained on a Ray cluster" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python"
ENTRYPOINT ["raylivecell"]
CMD ["--help"]
