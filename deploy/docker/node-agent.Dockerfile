# One per host: devices, workers, quotas, profiling runs.
# From the repository's root: docker build --file deploy/docker/node-agent.Dockerfile --tag hasgpu/node-agent .
#
# VARIANT=cpu (default) takes the CPU build of torch where pip's settings offer one, else PyPI's, which serves CPUs as well
# and is some gigabytes larger. VARIANT=cuda takes PyPI's and insists on CUDA.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# The same for every service up to here, and so built (and kept) once: what hasgpu_runtime needs.
FROM ${PYTHON_IMAGE} AS third-party
# pip's own settings, where it has to ask somewhere else; none is named here
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG PIP_TRUSTED_HOST=
WORKDIR /build
COPY constraints.txt deploy/docker/third_party.py ./
COPY proto/pyproject.toml proto/
COPY libs/core/pyproject.toml libs/core/
COPY libs/runtime/pyproject.toml libs/runtime/
RUN python -m venv /opt/builder && python -m venv --without-pip /opt/hasgpu \
 && /opt/builder/bin/pip install --no-cache-dir --constraint constraints.txt hatchling \
 && python third_party.py hasgpu-runtime > runtime.txt \
 && /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-cache-dir --constraint constraints.txt --requirement runtime.txt
# torch alone: the layer that takes longest and changes least
ARG VARIANT=cpu
RUN case "$VARIANT" in \
      cpu) /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-cache-dir --constraint constraints.txt torch ;; \
      cuda) env --unset=PIP_FIND_LINKS --unset=PIP_EXTRA_INDEX_URL \
            /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-cache-dir --constraint constraints.txt torch \
         && /opt/hasgpu/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None and "torch has no CUDA")' ;; \
      *) echo "VARIANT must be cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac
COPY libs/device/pyproject.toml libs/device/
COPY services/node-agent/pyproject.toml services/node-agent/
COPY deploy/docker/models.txt ./
RUN python third_party.py hasgpu-node-agent > own.txt \
 && /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-cache-dir --constraint constraints.txt \
        --requirement own.txt --requirement models.txt

# The gate's critical section in C needs a compiler, which stays here.
FROM third-party AS code
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev > /dev/null && rm -rf /var/lib/apt/lists/*
COPY proto proto
COPY libs/core libs/core
COPY libs/runtime libs/runtime
COPY libs/device libs/device
COPY services/node-agent services/node-agent
RUN /opt/builder/bin/pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir wheels ./proto ./libs/core ./libs/runtime ./libs/device ./services/node-agent \
 && /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-deps --no-index --target /opt/code wheels/*.whl \
 && CC=gcc PYTHONPATH=/opt/code /opt/hasgpu/bin/python -m hasgpu_device.native \
 && ls /opt/code/hasgpu_device/native/gate-*.so

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 hasgpu && useradd --uid 10001 --gid hasgpu --no-create-home --home-dir /tmp hasgpu
ENV PATH=/opt/hasgpu/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HASGPU_LISTEN=0.0.0.0:9000 \
    HF_HUB_OFFLINE=1
COPY --from=third-party /opt/hasgpu /opt/hasgpu
COPY --from=code /opt/code /opt/hasgpu/lib/python3.11/site-packages
ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL hasgpu.variant="${VARIANT}" \
      org.opencontainers.image.title="hasgpu-node-agent" \
      org.opencontainers.image.description="One per host: devices, workers, quotas, profiling runs." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
EXPOSE 9000
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/opt/hasgpu/lib/python3.11/site-packages/hasgpu_runtime/healthcheck.py"]
ENTRYPOINT ["python", "-m", "hasgpu_node_agent"]
