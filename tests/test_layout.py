"""Who may import what, and other rules about the source itself."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import personvit_hf

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "personvit_hf"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

MAX_FILE_LINES = 500
MAX_MODEL_LINES = 600  # of the one file that tells the whole model
MAX_FUNCTION_LINES = 60  # without its docstring

# Served as remote code beside the weights.
HUB_FILES = {
    "configuration_personvit.py",
    "convolution_stem.py",
    "image_processing_personvit.py",
    "linear.py",
    "losses.py",
    "modeling_personvit.py",
    "modeling_personvit_pretraining.py",
}
HUB_LIBRARIES = {"torch", "torchvision", "numpy", "transformers", "huggingface_hub"}
# What training feeds on is known before there is a model.
MODEL_FREE_FILES = [
    *("masking.py", "augmentation.py", "sampling.py", "schedules.py", "reid_data.py", "person_images.py"),
    *("file_trees.py", "reid_layouts.py", "preparing.py", "shards.py", "streaming.py", "dataset_loading.py"),
    *("tracks.py", "detection.py", "video.py", "shared_files.py"),
]

every_module = pytest.mark.parametrize("file", MODULES)


def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file of the package or an example imports anywhere in it."""
    names = set()
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            parents = ("personvit_hf", *path.relative_to(PACKAGE).parts)[: -node.level]
            names.add(".".join((*parents, node.module or "*")))  # `from . import x` could be any sibling: "*"
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def package_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "personvit_hf"}


def all_package_imports(path: Path) -> set[str]:
    """Also what the modules import that a file imports, and so on."""
    found, new = set(), package_imports(path)
    while new:
        found |= new
        paths = [PACKAGE / f"{name.removeprefix('personvit_hf.').replace('.', '/')}.py" for name in new]
        new = set().union(*(package_imports(path) for path in paths if path.is_file())) - found
    return found


def libraries(path: Path) -> set[str]:
    """Packages that a file needs besides the standard library and this one."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"personvit_hf"}


def docstring_lines(function: ast.FunctionDef) -> int:
    if ast.get_docstring(function) is None:
        return 0
    return function.body[0].end_lineno - function.body[0].lineno + 1


def run_python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("file", sorted(HUB_FILES))
def test_hub_files_stand_alone(file):
    path = PACKAGE / file
    # transformers finds siblings by a regular expression: it must see just the imports that Python sees, and no
    # sentence of a docstring.
    siblings = set(get_relative_imports(path))
    assert {f"personvit_hf.{name}" for name in siblings} == package_imports(path)
    assert {f"{name}.py" for name in siblings} <= HUB_FILES
    assert libraries(path) <= HUB_LIBRARIES


@pytest.mark.parametrize("file", MODEL_FREE_FILES)
def test_what_training_feeds_on_never_imports_the_model(file):
    model = {"personvit_hf", "personvit_hf.*", "personvit_hf.embedding", "personvit_hf.conversion"}
    model |= {f"personvit_hf.{name.removesuffix('.py')}" for name in HUB_FILES if name.startswith("modeling")}
    assert not all_package_imports(PACKAGE / file) & model


def test_the_metric_folder_runs_without_torch():
    run_python(
        f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(PACKAGE)!r})\n"
        "import numpy as np\n"
        "from reid_retrieval.ranking import evaluate_reid\n"
        "from reid_retrieval.reranking import rerank\n"
        "ids = {'query_person_ids': [1, 2], 'gallery_person_ids': [1, 2], 'protocol': 'any_camera'}\n"
        "eye = np.eye(2)\n"
        "assert evaluate_reid(eye, eye, **ids)['mAP'] == 1\n"
        "assert evaluate_reid(distances=rerank(eye, eye, 2, 1), **ids)['mAP'] == 1"
    )


def test_the_metric_folder_needs_numpy_and_torch_alone_and_is_whole():
    folder = PACKAGE / "reid_retrieval"
    metric = folder / "reid_retrieval.py"
    siblings = {path for path in folder.glob("*.py") if path not in (metric, folder / "__init__.py")}
    for path in siblings:
        # torch, where what comes in is on a GPU
        assert libraries(path) <= {"numpy", "torch"}, path.name
        assert {name.removeprefix("personvit_hf.reid_retrieval.") for name in package_imports(path)} <= {
            sibling.stem for sibling in siblings
        }
    # `evaluate.load` copies what the metric itself imports.
    assert package_imports(metric) == {f"personvit_hf.reid_retrieval.{path.stem}" for path in siblings}


def test_nothing_imports_the_examples():
    examples = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    importers = {**MODULES, **examples}
    assert not {file for file, path in importers.items() if imports(path) & {"examples", *examples}}


@every_module
def test_files_are_short(file):
    num_lines = len(MODULES[file].read_text().splitlines())
    assert num_lines <= (MAX_MODEL_LINES if file == "modeling_personvit.py" else MAX_FILE_LINES)


@every_module
def test_functions_are_short(file):
    functions = [node for node in ast.walk(syntax_tree(MODULES[file])) if isinstance(node, ast.FunctionDef)]
    num_lines = [(node.name, node.end_lineno - node.lineno + 1 - docstring_lines(node)) for node in functions]
    assert not [(name, lines) for name, lines in num_lines if lines > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("name", personvit_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(personvit_hf, name).__name__ == name
    assert name in dir(personvit_hf)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PersonVit"):
        personvit_hf.PersonVit  # noqa: B018


def test_version_is_the_one_of_setup_cfg():
    declared = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)
    assert personvit_hf.__version__ == declared[1]


def test_every_setting_is_read_somewhere():
    read = set()
    for file, path in MODULES.items():
        if file == "configuration_personvit.py":
            continue
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "config":
                read.add(node.attr)
    settings = set(inspect.get_annotations(personvit_hf.PersonViTConfig))
    assert "patch_size" in settings
    assert not settings - read


def test_importing_the_package_registers_the_auto_classes():
    output = run_python(
        "import personvit_hf, transformers as t\n"
        "config = t.AutoConfig.for_model('personvit', hidden_size=32, num_attention_heads=2, intermediate_size=32,\n"
        "    num_hidden_layers=1, projection_hidden_size=8, num_cls_prototypes=8, num_patch_prototypes=8)\n"
        "for auto in (t.AutoModel, t.AutoModelForPreTraining, t.AutoModelForImageClassification):\n"
        "    print(type(auto.from_config(config)).__name__)\n"
        "processors = t.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING[type(config)]\n"
        "print(processors['torchvision'].__name__, processors['pil'].__name__)\n"
    )
    assert output.split() == [
        "PersonViTModel",
        "PersonViTForPreTraining",
        "PersonViTForReID",
        "PersonViTImageProcessor",
        "PersonViTImageProcessorPil",
    ]
