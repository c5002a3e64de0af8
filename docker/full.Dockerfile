# Serves, trains, evaluates and exports any model, with PyTorch.
#
#   docker build -f docker/full.Dockerfile -t detrkit .
#   docker run --gpus all -p 8000:8000 -v detrkit-cache:/cache detrkit
#   docker run -v "$PWD:/work" -w /work --user "$(id -u)" detrkit detect photo.jpg
#
# For machines without a GPU, --build-arg PIP_EXTRA_INDEX_URL=... with PyTorch's index of CPU packages saves space.

FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/detrkit
ENV PATH=/opt/detrkit/bin:$PATH
COPY . /src
RUN pip install --no-cache-dir '/src[coco,export,serve,train]'

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home detrkit && install -d -o detrkit -m 1777 /cache
COPY --from=build /opt/detrkit /opt/detrkit
ENV PATH=/opt/detrkit/bin:$PATH HF_HOME=/cache HOME=/cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["detrkit"]
CMD ["serve", "--model", "detr-resnet-50", "--host", "0.0.0.0", "--log-format", "json"]
