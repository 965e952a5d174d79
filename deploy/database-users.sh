#!/bin/sh
# Creates the services' database user, or sets its password; safe to repeat. Runs in postgres.
# `python -m store migrate` then grants it what it needs.
set -eu

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set password="$SERVICES_DATABASE_PASSWORD" <<'SQL'
SELECT 'CREATE ROLE comfyui_temporal_services'
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'comfyui_temporal_services') \gexec
ALTER ROLE comfyui_temporal_services LOGIN PASSWORD :'password';
SQL
