"""The HTTP edge: the tasks API, live streams, ComfyUI's callbacks, the live page.

app.py                   the application, made of explicitly given parts
openapi.py               the OpenAPI document, where it differs from the framework's
openapi_export.py        writes that document to docs/openapi.json, and checks it for drift
access.py                the dependencies that authenticate and authorise callers (contract §7)
tokens.py                our own short-lived stream tokens; callers' JWTs are read by runtime/caller_tokens.py
problems.py              every error as application/problem+json
request_limits.py        limits for the size and the duration of a request
task_routes.py           the tasks API: access, input, output
task_bodies.py           its bodies
tasks.py                 what the routes do, for one caller's tenant
rollback.py              giving a task's credits back on request
temporal_calls.py        calls to Temporal during requests: with time limits, every failure a problem
streams.py               the routes of live streams: caller, tasks, position
streams_hub.py           new events of all tasks, once in each process
streams_subscriber.py    one open stream
streams_wires.py         Server-Sent Events and WebSocket
streams_cursors.py       a stream's position, as one opaque cursor
callbacks.py             POST /callbacks/comfyui/{task_id}: bytes in, one of contract §2's answers out
signatures.py            Standard Webhooks: verification, and which messages are repeats
callback_body.py         verified bytes → a callback
callback_relay.py        callback → signal: coalesced and rate limited, one line per task
callback_news.py         whether a callback is new for the workflow, and the rate limit per task
task_runs.py             the signal itself, and the state of a run that takes none
training_log_writer.py   log lines → task store, in batches per task
operations_routes.py     /healthz, /readyz, /metrics
metrics.py               what is counted
draining.py              shutdown: streams are notified before the server stops
page/                    the live page
"""
