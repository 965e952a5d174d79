"""What reaches us over HTTP, and who may.

app.py                   the application, made of explicitly given parts
tokens.py                JWTs → who is asking; our own stream tokens
access.py                the dependencies that let a caller in (contract §7)
problems.py              every error as application/problem+json
callbacks.py             POST /callbacks/comfyui/{task_id}: bytes in, one of contract §2's answers out
signatures.py            Standard Webhooks: who may call back, and which message came before
callback_body.py         verified bytes → a callback
callback_relay.py        callback → signal: coalesced and paced, one line per task
callback_news.py         what a signal is worth, and how many a task may get
task_runs.py             the signal itself, and what became of a run that takes none
training_log_writer.py   log lines → task store, in batches per task
"""
