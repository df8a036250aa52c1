from .logprobs import linear_token_logprobs, token_logprobs

__all__ = ["linear_token_logprobs", "token_logprobs"]
