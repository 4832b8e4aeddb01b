# A slim runtime: `docker run -v /slides:/slides:ro -v /results:/results wsi-anomaly run /slides -m MODEL -o /results`.
# With CUDA libraries by default. For a machine without a GPU, pass PyTorch's own CPU index, and the image is 4 GB smaller:
# docker build --build-arg TORCH_INDEX=URL -t wsi-anomaly .
FROM python:3.13-slim AS build
ARG TORCH_INDEX=
RUN python -m venv /opt/wsi-anomaly
ENV PATH=/opt/wsi-anomaly/bin:$PATH
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE /src/
COPY wsi_anomaly /src/wsi_anomaly
RUN pip install --no-cache-dir /src

FROM python:3.13-slim
COPY --from=build /opt/wsi-anomaly /opt/wsi-anomaly
RUN useradd --create-home --uid 1000 pathologist && install -d -o pathologist /results
ENV PATH=/opt/wsi-anomaly/bin:$PATH MPLCONFIGDIR=/tmp
USER pathologist
WORKDIR /results
ENTRYPOINT ["wsi-anomaly"]
CMD ["--help"]
