# Torch stages: tokenizer, behaviour encoder, ranker; torchrun or one process. Built from the repository root.
FROM python:3.11.7-slim-bookworm
ARG SID_GIT_SHA=unknown
ENV SID_GIT_SHA=${SID_GIT_SHA} PYTHONUNBUFFERED=1 SID_HOME=/var/lib/sidmill
RUN useradd --create-home --uid 10001 sid && mkdir -p /var/lib/sidmill && chown sid /var/lib/sidmill
WORKDIR /opt/sidmill
COPY constraints.txt pyproject.toml README.md ./
COPY pipeline pipeline
COPY jobs jobs
COPY sql sql
COPY dags dags
RUN pip install --no-cache-dir --constraint constraints.txt ".[lake,encoders,train]"
USER sid
ENTRYPOINT ["python", "-m", "jobs.cli"]
