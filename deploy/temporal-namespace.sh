#!/bin/sh
# Creates the namespace with its retention and search attributes; safe to repeat. Runs in temporalio/admin-tools.
set -eu

until temporal operator cluster health; do
    echo "waiting for Temporal at $TEMPORAL_ADDRESS"
    sleep 2
done

temporal operator namespace describe --namespace "$TEMPORAL_NAMESPACE" >/dev/null 2>&1 ||
    temporal operator namespace create --namespace "$TEMPORAL_NAMESPACE" --retention "$RETENTION"
temporal operator namespace update --namespace "$TEMPORAL_NAMESPACE" --retention "$RETENTION"

for name in $SEARCH_ATTRIBUTES; do
    # A new namespace is not known everywhere immediately.
    until temporal operator search-attribute create --namespace "$TEMPORAL_NAMESPACE" --name "$name" --type Keyword; do
        sleep 1
    done
done
