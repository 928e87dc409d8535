# The command hasgpu, for a system that runs in containers.
# From the repository's root: docker build --file deploy/docker/cli.Dockerfile --tag hasgpu/cli .
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
COPY libs/sim/pyproject.toml libs/sim/
COPY cli/pyproject.toml cli/
RUN python third_party.py hasgpu-cli > own.txt \
 && /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-cache-dir --constraint constraints.txt --requirement own.txt

FROM third-party AS code
COPY proto proto
COPY libs/core libs/core
COPY libs/runtime libs/runtime
COPY libs/sim libs/sim
COPY cli cli
RUN /opt/builder/bin/pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir wheels ./proto ./libs/core ./libs/runtime ./libs/sim ./cli \
 && /opt/builder/bin/pip --python /opt/hasgpu/bin/python install --no-deps --no-index --target /opt/code wheels/*.whl

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 hasgpu && useradd --uid 10001 --gid hasgpu --no-create-home --home-dir /tmp hasgpu
ENV PATH=/opt/hasgpu/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
COPY --from=third-party /opt/hasgpu /opt/hasgpu
COPY --from=code /opt/code /opt/hasgpu/lib/python3.11/site-packages
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hasgpu-cli" \
      org.opencontainers.image.description="The command hasgpu, for a system that runs in containers." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
ENTRYPOINT ["python", "-m", "hasgpu_cli"]
