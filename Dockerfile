# The image of our services: they differ by their command (docker-compose.yml). `--target simulators` is the same with the
# simulated ComfyUI and credits service. A base of another digest: `--build-arg PYTHON_IMAGE=…`.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS packages
# requirements-otel.lock: with OpenTelemetry's exporter, for COMFYUI_TEMPORAL_TRACES.
ARG LOCK=requirements.lock
COPY ${LOCK} locked
# Compiled once here, and not by every process at its start. Sources in C, type stubs, tests and commands of packages are
# used by nobody in a container.
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-compile --require-hashes \
        --target /packages -r locked \
    && rm -rf /packages/bin /packages/sqlalchemy/testing /packages/alembic/testing \
    && find /packages -type d -name tests -prune -exec rm -rf {} + \
    && find /packages -type f \( -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' \) -delete \
    && python -m compileall -q --invalidation-mode unchecked-hash /packages

FROM ${PYTHON_IMAGE} AS app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app:/packages
RUN groupadd --gid 10001 app \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin app \
    && install -d -o app -g app /data
COPY --from=packages /packages /packages
WORKDIR /app
COPY *.py ./
COPY comfyui_temporal comfyui_temporal
COPY workflows workflows
COPY activities activities
COPY store store
COPY gateway gateway
COPY bridge bridge
COPY runtime runtime
COPY doctor doctor
# Of the proofs only the conformance cases, which `doctor` runs.
COPY proof/__init__.py proof/__init__.py
COPY proof/conformance proof/conformance
RUN python -m compileall -q --invalidation-mode unchecked-hash /app
VOLUME /data

ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="comfyui-temporal" \
      org.opencontainers.image.description="ComfyUI jobs and credits as durable Temporal workflows" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM app AS simulators
COPY proof/simulators proof/simulators
RUN python -m compileall -q --invalidation-mode unchecked-hash /app/proof
USER 10001:10001

FROM app AS services
USER 10001:10001
# The worker's, whose command is the default; docker-compose.yml has one for each service.
ENV COMFYUI_TEMPORAL_WORKER_HOST=0.0.0.0 COMFYUI_TEMPORAL_HEALTH_PORT=8192
HEALTHCHECK --interval=5s --timeout=5s --start-period=20s --retries=12 \
    CMD ["python", "-IS", "/app/runtime/health_check.py", "http://127.0.0.1:8192/startupz"]
CMD ["python", "worker.py"]
