import cache_accuracy

from tests.tiny_models import TinySpec, write_tiny_model


def test_every_cache_is_measured(tmp_path, capsys):
    def biased(_, tensors):
        for name, tensor in tensors.items():
            if name.endswith("attn_k.bias"):
                tensor.data.reshape(2, 64)[:, 0] = 300

    spec = TinySpec(head_dim=64, n_head_kv=2, n_layer=2, n_ff=256, n_ctx=512)
    write_tiny_model(tmp_path / "m.gguf", spec, biased)
    (tmp_path / "text").write_text("Some words, again and again. " * 40)
    cache_accuracy.main(str(tmp_path / "text"), str(tmp_path / "m.gguf"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(cache_accuracy.CASES)
    kl = [float(line.split("KL ")[1]) for line in lines]
    assert 0 < min(kl) <= max(kl) < 0.01
