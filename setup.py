"""Install the `globalkd` package: `pip install -e .`, after torch and detectron2."""

from setuptools import find_packages, setup

# tools/export_student.py --output student.onnx
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18"]

setup(
    name="globalkd",
    version="0.1.0",
    description="Knowledge distillation of object detectors for Detectron2 (GlobalKD, DRKD)",
    license="Apache-2.0",
    package_dir={"": "projects/GlobalKD"},
    packages=find_packages("projects/GlobalKD"),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        # Detectron2 is not on the package index: tools/install_detectron2.py or upstream's build.
        "setuptools<81",  # Detectron2 imports pkg_resources
        "fvcore>=0.1.5,<0.1.6",
        "pycocotools>=2.0.2",
        "faster-coco-eval>=1.6.5",
        "numpy>=1.23",
        "opencv-python>=4.8",
        "scikit-learn>=1.3",
        "scipy>=1.9",
        "safetensors>=0.4",
        "matplotlib>=3.6",
        "tensorboard>=2.12",
        "tqdm>=4.60",
        "tabulate>=0.9",
    ],
    extras_require={
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.6", *EXPORT],
        "export": EXPORT,
    },
)
