"""Views of an image: mapped back, every token is where it was."""

from __future__ import annotations

import pytest
import torch

from register_adapter.training.objectives.views import View, choose_views, denoised_tokens, make_views, map_back

GRID, PATCH = (6, 5), 4
WHITE = torch.tensor([1.0, 0.5, -1.0])


def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
    """A teacher without context: the mean colour of every patch, ``(B, P, 3)``."""
    return torch.nn.functional.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_views_are_the_image_then_distinct_shifts(seed: int) -> None:
    views = choose_views(10, (16, 16), seed)
    assert views == choose_views(10, (16, 16), seed)
    assert views[0] == View(0, 0, False)
    assert len({(view.down, view.right) for view in views}) == 10
    assert all(abs(view.down) <= 2 and abs(view.right) <= 2 for view in views)
    assert choose_views(10, (16, 16), seed - 1) != views


def test_there_is_at_least_one_view() -> None:
    with pytest.raises(ValueError, match="at least 1 view, got 0"):
        choose_views(0, GRID, 0)


@pytest.mark.parametrize("view", [View(), View(2, 1), View(-1, 2), View(1, -2, True), View(0, 0, True), View(-2, -2)])
def test_tokens_come_back_to_their_places(view: View) -> None:
    # Beside another image with another view.
    pixels = torch.randn(2, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    shown = make_views(pixels, [View(1, 1, not view.flip), view], (PATCH, PATCH), WHITE)
    where, back = map_back(tokens_of(shown)[1], view, GRID)
    assert back.shape == (GRID[0] - abs(view.down), GRID[1] - abs(view.right), 3)
    torch.testing.assert_close(back, tokens_of(pixels)[1].view(*GRID, 3)[where])


def test_a_view_is_shifted_down_and_to_the_right_and_then_flipped() -> None:
    pixels = torch.arange(24.0 * 20).reshape(1, 1, 24, 20).expand(1, 3, -1, -1)
    [view] = make_views(pixels, [View(1, 2, True)], (PATCH, PATCH), WHITE)
    shifted = WHITE[:, None, None].expand(3, 24, 20).clone()
    shifted[:, PATCH:, 2 * PATCH :] = pixels[0, :, :-PATCH, : -2 * PATCH]
    assert torch.equal(view, shifted.flip(-1))


def test_what_comes_in_from_outside_is_white() -> None:
    [view] = make_views(torch.zeros(1, 3, 24, 20), [View(1, 0)], (PATCH, PATCH), WHITE)
    assert torch.equal(view[:, :PATCH], WHITE[:, None, None].expand(3, PATCH, 20))
    assert not view[:, PATCH:].any()


def test_a_teacher_without_context_is_its_own_mean() -> None:
    pixels = torch.randn(3, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    mean = denoised_tokens(tokens_of, pixels, [1, 2, 3], GRID, WHITE, num_views=7)
    torch.testing.assert_close(mean, tokens_of(pixels))


def test_noise_at_fixed_places_is_averaged_out() -> None:
    def noisy(pixels: torch.Tensor) -> torch.Tensor:
        tokens = tokens_of(pixels)
        tokens[:, 12] += 100.0
        return tokens

    pixels = torch.randn(2, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    mean = denoised_tokens(noisy, pixels, [5, 6], GRID, WHITE, num_views=10)
    assert (mean - tokens_of(pixels)).abs().amax() < 60.0


def test_an_image_has_the_same_target_in_any_batch() -> None:
    pixels = torch.randn(4, 3, GRID[0] * PATCH, GRID[1] * PATCH)

    def positional(values: torch.Tensor) -> torch.Tensor:
        tokens = tokens_of(values)
        return tokens * torch.arange(tokens.shape[1])[:, None]

    together = denoised_tokens(positional, pixels, [7, 8, 9, 10], GRID, WHITE, num_views=5)
    alone = denoised_tokens(positional, pixels[2:3], [9], GRID, WHITE, num_views=5, batch_size=2)
    torch.testing.assert_close(together[2:3], alone)
    known = denoised_tokens(positional, pixels, [7, 8, 9, 10], GRID, WHITE, num_views=5, plain=positional(pixels))
    torch.testing.assert_close(known, together)
