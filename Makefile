# make demo   train SSDLite on the sample data set and draw what it finds (nine minutes on two CPU cores)
# make test   ruff and pytest

PYTHON = .venv/bin/python
RUN = demo/training
# glibc would hand the memory of each step back to the system, only to ask for it again.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

.PHONY: demo test

demo: .venv/installed
	$(PYTHON) -m src.shapes demo/shapes --train 650 --val 100 --seed 0
	rm -rf $(RUN)
	$(KEEP_MEMORY) $(PYTHON) train.py --data-path demo/shapes --model ssdlite --no-pretrained-backbone \
	  --epochs 6 --multistep 5 --batch-size 4 --lr 0.06 --num-workers 2 \
	  --save-folder $(RUN) --log-path $(RUN)/tensorboard
	$(PYTHON) test_dataset.py --data-path demo/shapes --pretrained-model $(RUN)/ssdlite_best.pth \
	  --num-workers 2 --output demo/predictions
	@echo "The checkpoint is $(RUN)/ssdlite_best.pth; look at the pictures in demo/predictions,"
	@echo "and at the curves with: .venv/bin/tensorboard --logdir $(RUN)/tensorboard"

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m pytest

.venv/installed: requirements.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
