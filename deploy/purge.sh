#!/bin/sh
# Deletes what is older than the retention, now and again every $PURGE_EVERY_SECONDS. Runs in the image of our services.
# A purge that fails ends the container, which then starts again: it is seen, and repeated. /tmp/purged tells the check.
set -eu

while :; do
    python -m store purge
    touch /tmp/purged
    sleep "$PURGE_EVERY_SECONDS"
done
