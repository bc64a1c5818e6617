"""tmp"""
def install(*, algorithm: bool, cpu_platform: bool) -> None:
    if cpu_platform:
        from sglang.srt.arg_groups import choices
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from dspark_sglang.serving.cpu.platform import BACKEND, assign_slots
        choices.add_attention_backend_choices([BACKEND]); choices.add_draft_attention_backend_choices([BACKEND])
        @register_attention_backend(BACKEND)
        def make(runner):
            from dspark_sglang.serving.cpu.attention import CpuAttentionBackend
            return CpuAttentionBackend(runner)
        from dspark_sglang.serving.cpu import ops
        if not __import__("os").environ.get("NOOPS"):
            ops.register(BACKEND)
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        HookRegistry.register("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", assign_slots, HookType.REPLACE)
