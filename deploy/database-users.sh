#!/bin/sh
# Creates the databases and their users, or sets the users' passwords; safe to repeat. Runs in postgres, as its superuser,
# whom nobody else uses. `python -m store migrate` then grants comfyui_temporal_services what it needs.
set -eu

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres <<'SQL'
\getenv temporal_password TEMPORAL_DATABASE_PASSWORD
\getenv owner_password OWNER_DATABASE_PASSWORD
\getenv services_password SERVICES_DATABASE_PASSWORD

SELECT format('CREATE ROLE %I', wanted.role)
    FROM unnest(ARRAY['temporal', 'comfyui_temporal', 'comfyui_temporal_services']) AS wanted (role)
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.role) \gexec
ALTER ROLE temporal LOGIN PASSWORD :'temporal_password';
ALTER ROLE comfyui_temporal LOGIN PASSWORD :'owner_password';
ALTER ROLE comfyui_temporal_services LOGIN PASSWORD :'services_password';

SELECT format('CREATE DATABASE %I OWNER %I', wanted.name, wanted.owner)
    FROM (VALUES ('temporal', 'temporal'), ('temporal_visibility', 'temporal'), ('comfyui_temporal', 'comfyui_temporal'))
        AS wanted (name, owner)
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = wanted.name) \gexec
REVOKE CONNECT ON DATABASE temporal, temporal_visibility, comfyui_temporal FROM PUBLIC;
GRANT CONNECT ON DATABASE comfyui_temporal TO comfyui_temporal_services;
SQL
