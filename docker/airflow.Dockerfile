# Scheduler, DAG processor, triggerer and API server. The scheduler's LocalExecutor runs torch stages here and submits Spark stages to the cluster.
# Built from the repository root: docker build -f docker/airflow.Dockerfile .
FROM python:3.11.7-slim-bookworm
ARG SID_GIT_SHA=unknown
ENV SID_GIT_SHA=${SID_GIT_SHA} PYTHONUNBUFFERED=1 AIRFLOW_HOME=/var/lib/airflow SID_HOME=/var/lib/sidmill AIRFLOW__CORE__DAGS_FOLDER=/opt/sidmill/dags AIRFLOW__CORE__LOAD_EXAMPLES=False
RUN useradd --create-home --uid 10001 sid && mkdir -p /var/lib/airflow /var/lib/sidmill && chown sid /var/lib/airflow /var/lib/sidmill
# PostgreSQL's JDBC driver, for the catalog: Debian's package is one jar.
RUN apt-get update && apt-get install --yes --no-install-recommends libpostgresql-jdbc-java && rm -rf /var/lib/apt/lists/* \
    && mkdir /opt/jars && cp --dereference /usr/share/java/postgresql.jar /opt/jars/postgresql.jar
WORKDIR /opt/sidmill
COPY constraints.txt pyproject.toml README.md ./
COPY pipeline pipeline
COPY jobs jobs
COPY sql sql
COPY dags dags
RUN pip install --no-cache-dir --constraint constraints.txt ".[orchestrate,lake,encoders,train]" psycopg2-binary asyncpg
USER sid
ENTRYPOINT ["airflow"]
