# docker build --network=host -t ssd .
# docker run --rm -it --gpus all -v "$PWD/coco:/coco" -v "$PWD/trained_models:/trained_models" \
#   --ipc=host --network=host ssd
FROM python:3.12-slim
WORKDIR /ssd
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
# Weights land in the mounted folder, not in the container.
RUN mkdir -p /trained_models && ln -s /trained_models trained_models
CMD ["bash"]
