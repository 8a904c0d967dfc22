# An entry to the VLM3D challenge; docs/challenge.md says how to build and try it. The weights are mounted, not copied.
FROM python:3.12-slim

# The CUDA build that pip finds for this release needs a driver at least as new; another release works as well.
ARG TORCH=torch==2.13.0
RUN pip install --no-cache-dir "$TORCH"

WORKDIR /opt/vlm3d
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir '.[quant]'

# The embedded language model and text encoder: nothing can be fetched when the container runs.
ENV VLM3D_CACHE=/opt/vlm3d/cache
RUN python -m vlm3d.pretrained && chmod -R a+rX cache

RUN useradd --create-home --uid 1000 entrant && mkdir -p /input /output /weights && chown entrant /output
USER entrant
WORKDIR /home/entrant

# Where container runtimes put the driver's libraries, which a Python image does not say by itself.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

ARG TASK=classification
ARG YEAR=2026
ENV TASK=$TASK YEAR=$YEAR
ENTRYPOINT exec vlm3d challenge --task "$TASK" --year "$YEAR"
