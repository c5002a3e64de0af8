# Serves an exported folder: NumPy, Pillow and ONNX Runtime, without PyTorch.
#
#   docker build -f docker/runtime.Dockerfile -t detrkit-runtime .
#   docker run -p 8000:8000 -v "$PWD/my-onnx:/model:ro" detrkit-runtime

FROM python:3.12-slim AS build
RUN python -m venv /opt/detrkit
ENV PATH=/opt/detrkit/bin:$PATH
# What changes rarely comes first, so that Docker need not install it again.
COPY requirements /src/requirements
RUN pip install --no-cache-dir -r /src/requirements/runtime.txt -r /src/requirements/serve.txt
COPY . /src
RUN pip install --no-cache-dir --no-deps /src

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home detrkit
COPY --from=build /opt/detrkit /opt/detrkit
ENV PATH=/opt/detrkit/bin:$PATH
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["detrkit"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0", "--log-format", "json"]
