# make demo   train SSDLite on the sample data set and draw what it finds (README: how long it takes)
# make test   ruff and pytest, on two cores (WORKERS=8: on eight)
# make web    write demo/web/dist, the page that detects in a browser (CHECKPOINT=FILE: with another detector)
# make figures  train longer and make what is shown in demo/, but tensorboard.png (AMP=--amp: half precision, if the CPU can)
# make photos  draw what demo/ssdlite_voc.pth finds in the photographs of README, and run the notebook

PYTHON = .venv/bin/python
RUN = demo/training
CHECKPOINT = demo/ssdlite_voc.pth
WORKERS = 2
# By default threads wait for one another in a loop: beside other programs training would hardly move.
export OMP_WAIT_POLICY = PASSIVE
# glibc would hand the memory of each step back to the system, only to ask for it again.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

.PHONY: demo figures photos test web

demo: .venv/installed
	$(PYTHON) -m demo.shapes demo/shapes --train 650 --val 100 --seed 0
	rm -rf $(RUN)
	$(KEEP_MEMORY) $(PYTHON) train.py --data-path demo/shapes --model ssdlite --no-pretrained-backbone \
	  --epochs 6 --multistep 5 --batch-size 4 --lr 0.06 --num-workers 2 \
	  --save-folder $(RUN) --log-path $(RUN)/tensorboard
	$(PYTHON) test_dataset.py --data-path demo/shapes --pretrained-model $(RUN)/ssdlite_best.pth \
	  --num-workers 2 --output demo/predictions
	@echo "The checkpoint is $(RUN)/ssdlite_best.pth; look at the images in demo/predictions,"
	@echo "and at the curves with: .venv/bin/tensorboard --logdir $(RUN)/tensorboard"

figures: .venv/installed-dev
	$(PYTHON) -m demo.shapes demo/shapes --train 650 --val 100 --seed 0
	rm -rf $(RUN)
	$(KEEP_MEMORY) $(PYTHON) train.py --data-path demo/shapes --model ssdlite --no-pretrained-backbone \
	  --epochs 14 --multistep 11 13 --batch-size 16 --lr 0.04 $(AMP) --num-workers 1 \
	  --save-folder $(RUN) --log-path $(RUN)/tensorboard
	$(PYTHON) -m demo.slim $(RUN)/ssdlite_best.pth demo/ssdlite_shapes.pth
	$(PYTHON) -m demo.figures --data-path demo/shapes --pretrained-model demo/ssdlite_shapes.pth
	cp demo/shapes/val2017/000000000160.jpg demo/pictures/1.jpg
	cp demo/shapes/val2017/000000000178.jpg demo/pictures/2.jpg
	cp demo/shapes/val2017/000000000152.jpg demo/pictures/3.jpg
	$(PYTHON) -m demo.video --output demo/video.gif --pretrained-model demo/ssdlite_shapes.pth
	.venv/bin/jupyter execute --inplace demo/ssd_explained.ipynb

photos: .venv/installed-dev
	$(PYTHON) -m demo.photos --pretrained-model demo/ssdlite_voc.pth
	.venv/bin/jupyter execute --inplace demo/ssd_explained.ipynb

web: .venv/installed-export
	$(PYTHON) -m demo.web.build --pretrained-model "$(CHECKPOINT)"

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.venv/installed: requirements.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-export: requirements.txt requirements-export.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements-export.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-export.txt requirements-dev.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
