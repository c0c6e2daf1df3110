# mmfree-server with the demo model inside.
#   docker build --target cpu  -t mmfree-server:cpu .
#   docker build --target cuda -t mmfree-server:cuda .     (run it with --gpus all)
# Another model: docker run -v DIR:/model:ro IMAGE --model=/model --listen=0.0.0.0:50051 ...

FROM debian:12-slim AS build-cpu
WORKDIR /src
COPY deploy/install.sh deploy/packages.txt deploy/
RUN deploy/install.sh build
COPY . .
RUN cmake --preset release -DMMFREE_TESTS=OFF -DMMFREE_CUDA=OFF \
    && cmake --build --preset release --target mmfree-server mmfree \
    && install -D -s -t /opt/mmfree/bin build/release/bin/mmfree-server build/release/bin/mmfree \
    && deploy/runtime_packages.sh /opt/mmfree/bin/* >/opt/mmfree/packages.txt

# Ubuntu, for NVIDIA has no Debian image.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build-cuda
WORKDIR /src
COPY deploy/install.sh deploy/packages.txt deploy/
RUN deploy/install.sh build
COPY . .
RUN cmake --preset cuda -DMMFREE_TESTS=OFF \
    && cmake --build --preset cuda --target mmfree-server mmfree \
    && install -D -s -t /opt/mmfree/bin build/cuda/bin/mmfree-server build/cuda/bin/mmfree \
    && deploy/runtime_packages.sh /opt/mmfree/bin/* >/opt/mmfree/packages.txt

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda
RUN --mount=type=bind,from=build-cuda,source=/opt/mmfree,target=/mnt \
    apt-get update \
    && xargs apt-get install -y --no-install-recommends </mnt/packages.txt \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home --uid 10001 mmfree
COPY --from=build-cuda /opt/mmfree/bin/ /usr/local/bin/
COPY deploy/models/tales /models/tales
USER 10001
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["mmfree", "--server=localhost:50051", "health"]
ENTRYPOINT ["mmfree-server"]
CMD ["--model=/models/tales", "--listen=0.0.0.0:50051", "--metrics_listen=0.0.0.0:9090"]

# Last, to be the default target.
FROM debian:12-slim AS cpu
RUN --mount=type=bind,from=build-cpu,source=/opt/mmfree,target=/mnt \
    apt-get update \
    && xargs apt-get install -y --no-install-recommends </mnt/packages.txt \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home --uid 10001 mmfree
COPY --from=build-cpu /opt/mmfree/bin/ /usr/local/bin/
COPY deploy/models/tales /models/tales
USER 10001
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["mmfree", "--server=localhost:50051", "health"]
ENTRYPOINT ["mmfree-server"]
CMD ["--model=/models/tales", "--listen=0.0.0.0:50051", "--metrics_listen=0.0.0.0:9090"]
