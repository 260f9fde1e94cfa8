# syntax=docker/dockerfile:1
# One trained network in the image of crossx, so that a tag names software and weights together:
#   docker build -t crossx:0.1.0 .
#   docker build -t registry.example/birds:2026-03 -f deploy/model.Dockerfile runs/mine
# The build's context is the run; only what serving needs is copied. A shared model has no run.json.
ARG CROSSX=crossx:0.1.0
FROM ${CROSSX}
COPY --chown=10001:10001 model.json model.safetensors run.jso[n] /model/
