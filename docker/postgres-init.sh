#!/bin/sh
# One role and one database per user; run by the image on an empty volume. Passwords come from the environment and are quoted by psql, not by the shell.
set -eu
for name in airflow mlflow lake; do
    case "$name" in
        airflow) word=$AIRFLOW_PASSWORD ;;
        mlflow) word=$MLFLOW_PASSWORD ;;
        lake) word=$LAKE_PASSWORD ;;
    esac
    WORD=$word psql --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --set name="$name" <<'SQL'
\getenv word WORD
CREATE ROLE :"name" LOGIN PASSWORD :'word';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
