# bids_gacelle with everything it needs. Plain Dockerfile: Docker, Podman and Buildah build it.
#
#   docker build -t bids_gacelle:0.1.0-cpu .
#   docker build -t bids_gacelle:0.1.0-cuda --build-arg TORCH=cuda .
#
# CUDA comes with torch's own packages and the driver from the host, so both start from this base.
ARG BASE_IMAGE=debian:bookworm-slim

# What changes rarely comes first: torch, then the other dependencies, the project last.
FROM ${BASE_IMAGE} AS dependencies
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /venv
WORKDIR /src
ARG TORCH=cpu
ARG TORCH_INDEX=
COPY constraints.txt ./
COPY scripts scripts
RUN scripts/install_torch.sh /venv/bin/python
COPY pyproject.toml ./
RUN /venv/bin/python scripts/list_dependencies.py phantom > requirements.txt \
 && /venv/bin/pip install -c constraints.txt -r requirements.txt \
 && /venv/bin/pip check

FROM dependencies AS project
COPY LICENSE README.md ./
COPY bids_gacelle bids_gacelle
COPY workflows workflows
RUN /venv/bin/pip wheel --no-deps --wheel-dir /wheel .

FROM ${BASE_IMAGE}
# g++ and Python's headers: torch.compile turns the fit's kernels into machine code with them.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ libgomp1 libpython3-dev python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --home-dir /home/app app \
 && mkdir -p /data /out /work && chmod 1777 /home/app /out /work
COPY --from=dependencies /venv /venv
COPY --from=project /wheel /wheel
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
# Any user may run it on a read-only root: nothing is written outside /out, /work and /tmp.
ENV PATH=/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/app \
    LOGNAME=app \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    NO_ET=1 \
    NIPYPE_NO_ET=1 \
    OMP_NUM_THREADS=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BIDS_GACELLE_CONTAINER=docker
LABEL org.opencontainers.image.title="bids_gacelle" \
      org.opencontainers.image.description="Quantitative MRI maps with their uncertainty, from a BIDS dataset" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
USER app
WORKDIR /work
ENTRYPOINT ["bids-gacelle"]
CMD ["--help"]
