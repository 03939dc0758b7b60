from tests.continual.methods.toy_streams import check_equal, config_of, fresh, plain_loop, train


def test_a_stream_without_a_method_is_a_plain_loop(tmp_path):
    run = train(fresh(), config_of("naive"), tmp_path)
    check_equal(run.model, plain_loop(run, fresh()))


def test_it_remembers_nothing(tmp_path):
    run = train(fresh(), config_of("finetune"), tmp_path)
    from utils.training.resume import open_run

    state = open_run(tmp_path, model=fresh())[1]["continual"]
    assert state["memory"]["seen"] == 0
    assert run.finished
