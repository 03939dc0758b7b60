"""What template.ipynb needs works where nothing has been installed, and importing Seedbed costs nothing."""

import json

OPTIONAL = ("lightning", "pytorch_lightning", "optuna", "torchmetrics", "faiss", "wandb", "onnx", "onnxruntime")
NOT_IN_COLAB = (*OPTIONAL, "onnxscript", "lightning_utilities")


def test_tier1_runs_where_optional_packages_cannot_be_imported(run_python):
    result = run_python(
        """
        import json, sys
        import utils

        loaded = utils.load_model("example:gpt")
        report = utils.validate(loaded, tiers=(1,), progress=False)
        statuses = {result.check: result.status for result in report.results}
        heavy = [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules]
        passed = {"passed": report.passed, "verdict": report.verdict, "statuses": statuses, "heavy": heavy}
        print(json.dumps(passed))
        """,
        blocked=NOT_IN_COLAB,
    )
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["passed"], report
    assert report["verdict"] == "READY"
    assert len(report["statuses"]) >= 20
    assert report["heavy"] == [], "torch's compiler takes seconds to import"
    assert "fail" not in report["statuses"].values()


def test_the_report_is_written_where_optional_packages_cannot_be_imported(run_python, tmp_path):
    page = tmp_path / "report.html"
    run_python(
        f"""
        import utils

        utils.validate(utils.load_model("example:vit"), progress=False).to_html({str(page)!r})
        """,
        blocked=NOT_IN_COLAB,
    )
    assert "<html" in page.read_text(encoding="utf-8")


def test_training_without_lightning_says_what_to_install(run_python, tmp_path):
    result = run_python(
        """
        import utils
        from utils.runtime.errors import MissingPackageError

        try:
            from utils.training import TrainingConfig

            utils.train(utils.load_model("example:gpt"), "builtin:python-docs", config=TrainingConfig(max_steps=1))
        except MissingPackageError as error:
            print(error)
        """,
        blocked=("lightning", "pytorch_lightning"),
        cwd=tmp_path,
    )
    assert "pip install -r requirements-training.txt" in result.stdout


def test_import_is_quick_and_loads_nothing_optional(run_python):
    result = run_python(
        f"""
        import json, sys, time
        import torch

        start = time.perf_counter()
        import utils
        for name in ("load_model", "validate", "train", "resume", "export", "show", "ModelSpec"):
            assert name in dir(utils), name
        seconds = time.perf_counter() - start
        heavy = {(*OPTIONAL, "transformers", "matplotlib", "pandas", "scipy", "sklearn", "datasets", "ipywidgets")!r}
        print(json.dumps({{"seconds": seconds, "loaded": [name for name in heavy if name in sys.modules]}}))
        """
    )
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["loaded"] == []
    assert answer["seconds"] < 1.0
