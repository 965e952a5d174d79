#!/bin/sh
# Creates the tables of Temporal's two databases, or migrates them; safe to repeat. Runs in temporalio/admin-tools.
# database-users.sh has created the databases themselves.
set -eu

sql_tool() {
    temporal-sql-tool --plugin postgres12 --ep "$POSTGRES_SEEDS" --port "$DB_PORT" --user "$POSTGRES_USER" "$@"
}

bring_up_to_date() {
    database=$1
    schema=$2
    sql_tool --db "$database" setup-schema -v 0.0
    sql_tool --db "$database" update-schema -d "/etc/temporal/schema/postgresql/v12/$schema/versioned"
}

bring_up_to_date temporal temporal
bring_up_to_date temporal_visibility visibility
