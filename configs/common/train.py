"""Settings of a run: output, length, precision, checkpoints, evaluation."""

train = dict(
    output_dir="output",
    init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    max_iter=90000,
    # "float16" scales gradients and needs a GPU; "bfloat16" works everywhere.
    amp=dict(enabled=False, precision="float16"),
    # So many steps in a row whose loss is not finite are skipped; 0 stops at the first.
    max_nonfinite_steps=0,
    channels_last=False,
    # Backbone and head through torch.compile.
    compile=False,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # How many stay (None: all) next to the best; a thread writes them; "stop" or "continue" if one
    # cannot be written.
    checkpointer=dict(period=5000, max_to_keep=100, asynchronous=True, on_error="stop"),
    # `prepare_for_inference` with --eval-only; precision also "bfloat16", "float16" (GPU), "auto".
    prepare=dict(enabled=False, channels_last=True, precision="float32", compile=False),
    # Test-time augmentation with --eval-only. min_sizes=None stands for the scales and size ranges
    # of the release, multiplied by base_size / 800.
    tta=dict(
        enabled=False,
        min_sizes=None,
        base_size=800,
        max_size=4000,
        flip=True,
        size_ranges=(),
        merge="soft-vote",
        nms_thresh=0.6,
        vote_thresh=0.66,
        soft_score_thresh=0.05,
        max_detections=100,
    ),
    eval_period=5000,
    log_period=20,
    seed=-1,
    # "cpu" is used where there is no GPU.
    device="cuda",
)
