def test_run(script, flags, tmp_path):
    out = tmp_path / "run"
    script.main(script.parse_args(flags(out, use_ema=True, validation_prompts=["a b", "c"], checkpointing_steps=1, checkpoints_total_limit=1)))
    print(sorted(p.name for p in out.iterdir()))
    print((out/"metrics.jsonl").read_text())
    print((out/"README.md").read_text())
    script.main(script.parse_args(flags(out, use_ema=True, max_train_steps=3, validation_prompts=["a b", "c"], checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="latest")))
def test_lora(script, flags, tmp_path):
    out = tmp_path / "run"
    script.main(script.parse_args(flags(out, assistant_lora_rank=2, recipe="di_star_out", gradient_checkpointing=True)))
    print(sorted(p.name for p in (out/"assistant_lora").iterdir()))
