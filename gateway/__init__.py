"""What reaches us over HTTP, and who may.

app.py                   the application, made of explicitly given parts
openapi.py               what its OpenAPI document says beyond the framework's
openapi_export.py        that document as docs/openapi.json, and whether it has drifted
access.py                the dependencies that let a caller in (contract §7)
tokens.py                our own short-lived stream tokens; callers' JWTs are read by runtime/caller_tokens.py
problems.py              every error as application/problem+json
request_limits.py        how large a request may be, and how slow
task_routes.py           the tasks API: who may, what comes in, what goes out
task_bodies.py           its bodies
tasks.py                 what is done, for one caller's tenant
rollback.py              giving a task's credits back by hand
temporal_calls.py        Temporal, as requests see it: bounded, every failure a problem
streams.py               live streams: who asks, which tasks, from where
streams_hub.py           news of all tasks, once a process
streams_subscriber.py    one open stream
streams_wires.py         Server-Sent Events and WebSocket
streams_cursors.py       where a stream stands, as one opaque cursor
callbacks.py             POST /callbacks/comfyui/{task_id}: bytes in, one of contract §2's answers out
signatures.py            Standard Webhooks: who may call back, and which message came before
callback_body.py         verified bytes → a callback
callback_relay.py        callback → signal: coalesced and paced, one line per task
callback_news.py         what a signal is worth, and how many a task may get
task_runs.py             the signal itself, and what became of a run that takes none
training_log_writer.py   log lines → task store, in batches per task
operations_routes.py     /healthz, /readyz, /metrics
metrics.py               what is counted
draining.py              going away: told before the server stops
page/                    the live page
"""
