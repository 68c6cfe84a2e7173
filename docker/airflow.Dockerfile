# Scheduler, DAG processor, triggerer and API server: light imports only, stages run elsewhere. Built from the repository root.
FROM python:3.11.7-slim-bookworm
ARG SID_GIT_SHA=unknown
ENV SID_GIT_SHA=${SID_GIT_SHA} PYTHONUNBUFFERED=1 AIRFLOW_HOME=/var/lib/airflow SID_HOME=/var/lib/sidmill AIRFLOW__CORE__DAGS_FOLDER=/opt/sidmill/dags AIRFLOW__CORE__LOAD_EXAMPLES=False
RUN useradd --create-home --uid 10001 sid && mkdir -p /var/lib/airflow /var/lib/sidmill && chown sid /var/lib/airflow /var/lib/sidmill
WORKDIR /opt/sidmill
COPY constraints.txt pyproject.toml README.md ./
COPY pipeline pipeline
COPY jobs jobs
COPY sql sql
COPY dags dags
RUN pip install --no-cache-dir --constraint constraints.txt ".[orchestrate,lake]"
USER sid
ENTRYPOINT ["airflow"]
