#!/bin/sh
# Creates the namespace with its retention and search attributes; safe to repeat. Runs in temporalio/admin-tools.
# Gives up with a sentence after $WAIT_SECONDS.
set -eu

deadline=$(($(date +%s) + WAIT_SECONDS))

# attempt SENTENCE COMMAND...: repeats the command until it succeeds. Past the deadline: the command's last words.
attempt() {
    sentence=$1
    shift
    until answer=$("$@" --command-timeout 10s 2>&1); do
        if [ "$(date +%s)" -ge "$deadline" ]; then
            echo "$answer" >&2
            echo "$sentence (tried for $WAIT_SECONDS s)." >&2
            exit 1
        fi
        sleep 1
    done
}

attempt "Temporal at $TEMPORAL_ADDRESS does not answer: look at its log" temporal operator cluster health

temporal operator namespace describe --namespace "$TEMPORAL_NAMESPACE" --command-timeout 10s >/dev/null 2>&1 ||
    temporal operator namespace create --namespace "$TEMPORAL_NAMESPACE" --retention "$RETENTION" --command-timeout 10s
# A new namespace is not known everywhere immediately.
attempt "Namespace $TEMPORAL_NAMESPACE does not take the retention $RETENTION" \
    temporal operator namespace update --namespace "$TEMPORAL_NAMESPACE" --retention "$RETENTION"

for name in $SEARCH_ATTRIBUTES; do
    attempt "Namespace $TEMPORAL_NAMESPACE does not take the search attribute $name of type Keyword" \
        temporal operator search-attribute create --namespace "$TEMPORAL_NAMESPACE" --name "$name" --type Keyword
done
echo "Namespace $TEMPORAL_NAMESPACE keeps closed runs for $RETENTION and knows: $SEARCH_ATTRIBUTES"
