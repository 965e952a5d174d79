# One image for worker, gateway, table migrations and simulators: they differ by their command (docker-compose.yml).
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app

WORKDIR /app
COPY requirements.lock .
RUN python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock

COPY *.py ./
COPY activities activities
COPY bridge bridge
COPY cli cli
COPY conformance conformance
COPY contracts contracts
COPY gateway gateway
COPY simulators simulators
COPY store store
COPY workflows workflows
# The sandbox loads workflow modules anew for each run: without bytecode it would compile them each time.
RUN python -m compileall -q --invalidation-mode unchecked-hash /app

RUN useradd --system --create-home --uid 10001 app && mkdir /data && chown app /data
USER app
VOLUME /data

CMD ["python", "worker.py"]
