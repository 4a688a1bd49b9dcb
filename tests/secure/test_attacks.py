"""What a server or a member could try, and what comes of it."""

import dataclasses
import itertools

import numpy as np
import pytest

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.keys import PrivateKeys, PublicKeys, agree, is_private, public_of
from slora_flwr.secure.member import Member
from slora_flwr.secure.shares import join, seal, split, unseal
from slora_flwr.secure.terms import Terms
from tests.support.secure import draw

TERMS = Terms(7, 3, 1, 0.66)


def test_nobody_tells_both_secrets_of_one_member() -> None:
    held = draw(4, 3).share().mask()
    with pytest.raises(SecureError, match=r"both secrets of \[2\]"):
        held.members[0].tell([0, 1, 2, 3], [2])


def test_a_member_tells_of_those_who_shared_and_of_no_others() -> None:
    held = draw(4, 3).share({3}).mask()
    for alive, dead in (([0, 1], []), ([0, 1, 2, 3], []), ([1, 2], [0])):
        with pytest.raises(SecureError, match=r"holds shares of \[0, 1, 2\]"):
            held.members[0].tell(alive, dead)


@pytest.mark.parametrize("threshold", [0.5, 0.66])
@pytest.mark.parametrize("count", range(3, 9))
def test_no_split_of_the_members_gives_both_secrets_of_one(
    count: int, threshold: float
) -> None:
    """The server tells some that a member is in the sum, others that it is gone."""
    held = draw(count, 1)
    held = dataclasses.replace(held, threshold=threshold).share().mask()
    needed = held.members[0].needed
    for size in range(count + 1):
        for lied_to in itertools.combinations(range(1, count), size):
            seeds: dict[int, bytes] = {}
            keys: dict[int, bytes] = {}
            for i in range(count):
                dead = [0] if i in lied_to else []
                alive = [j for j in range(count) if j not in dead]
                try:
                    told = held.members[i].tell(alive, dead)[0]
                except SecureError:
                    continue
                (keys if dead else seeds)[i] = told
            assert len(seeds) < needed or len(keys) < needed


def test_masking_twice_is_refused() -> None:
    held = draw(3, 3).share().mask()
    with pytest.raises(SecureError, match="masks once"):
        held.members[0].mask(held.ring.zeros(3))


def test_masking_without_shares_is_refused() -> None:
    held = draw(3, 3).share()
    with pytest.raises(SecureError, match="after it has received shares"):
        held.members[0].mask(held.ring.zeros(3))


@pytest.mark.parametrize("place", [0, 11, 12, 40, 91])
def test_a_letter_that_was_changed_is_refused(place: int) -> None:
    held = draw(3, 3).share()
    letters = held.tally.letters_to(0)
    letters[1] = bytes(b ^ (i == place) for i, b in enumerate(letters[1]))
    with pytest.raises(SecureError, match="forged, changed or cut"):
        held.members[0].receive(letters)


@pytest.mark.parametrize("size", [0, 5, 12, 28, 91])
def test_a_letter_that_was_cut_is_refused(size: int) -> None:
    held = draw(3, 3).share()
    letters = held.tally.letters_to(0)
    letters[1] = letters[1][:size]
    with pytest.raises(SecureError, match="forged, changed or cut"):
        held.members[0].receive(letters)


def test_a_letter_to_another_or_from_another_is_refused() -> None:
    held = draw(3, 3).share()
    own, others = held.tally.letters_to(0), held.tally.letters_to(2)
    for letters in ({1: others[1]}, {1: own[2], 2: own[1]}):
        with pytest.raises(SecureError, match="forged, changed or cut"):
            held.members[0].receive(letters)
    with pytest.raises(SecureError, match="no neighbour"):
        held.members[0].receive({5: own[1]})


@pytest.mark.parametrize("changes", [{"run": 8}, {"server_round": 4}, {"attempt": 2}])
def test_a_letter_of_another_run_round_or_attempt_is_refused(
    changes: dict[str, int],
) -> None:
    held = draw(3, 3).share()
    first = held.members[0]
    other = Member(
        dataclasses.replace(first.terms, **changes), 0, first.keys, first.peers
    )
    other.letters()
    with pytest.raises(SecureError, match="forged, changed or cut"):
        other.receive(held.tally.letters_to(0))


def test_swapped_keys_are_noticed_as_letters_do_not_open() -> None:
    """The server gives member 0 keys of its own in the place of member 1's.

    It can then read and write member 1's letters, and take that member's place. What
    member 1 itself wrote does not open any more.
    """
    held = draw(3, 3)
    swapped = PrivateKeys.generate()
    victim = held.members[0]
    held.members[0] = Member(
        victim.terms, 0, victim.keys, victim.peers | {1: swapped.public}
    )
    held.share()
    with pytest.raises(SecureError, match="forged, changed or cut"):
        held.members[0].receive(held.tally.letters_to(0))


def test_masks_of_different_things_do_not_cancel() -> None:
    held = draw(3, 4000).share()
    for i, member in enumerate(held.members):
        member.receive(held.tally.letters_to(i))
        values = held.values[i].astype(held.ring.dtype)
        figures = held.figures[i].copy()
        member.mask(values, figures, about=b"other" if i == 2 else b"same")
        held.tally.add(i, held.ring.pack(values) + figures.tobytes())
    values, _ = held.tell().tally.open()
    assert (values == held.values.sum(axis=0)).sum() < 10


def test_keys_that_two_members_share_are_refused() -> None:
    own, other = PrivateKeys.generate(), PrivateKeys.generate()
    crossed = PublicKeys(other.public.mask, other.public.seal)
    for peers in ({1: own.public}, {1: other.public, 2: other.public}, {0: crossed}):
        with pytest.raises(SecureError, match="share a number or a key"):
            Member(TERMS, 0, own, peers)


def test_a_key_of_low_order_is_refused() -> None:
    with pytest.raises(SecureError, match="a public key is off"):
        agree(PrivateKeys.generate().mask, bytes(32), TERMS, "mask")


def test_secrets_of_pairs_depend_on_all_that_they_are_for() -> None:
    one, two = PrivateKeys.generate(), PrivateKeys.generate()
    secret = agree(one.mask, two.public.mask, TERMS, "mask")
    assert secret == agree(two.mask, one.public.mask, TERMS, "mask")
    others = [
        agree(one.mask, two.public.mask, TERMS, "share"),
        agree(one.mask, two.public.mask, TERMS, "mask", b"a state"),
        agree(one.mask, two.public.seal, TERMS, "mask"),
        *(
            agree(one.mask, two.public.mask, dataclasses.replace(TERMS, **c), "mask")
            for c in ({"run": 8}, {"server_round": 4}, {"attempt": 2})
        ),
    ]
    assert len({secret, *others}) == 7


@pytest.mark.parametrize("forger", [0, 3, 4])
@pytest.mark.parametrize("about", [1, 5])
def test_a_forged_share_is_named_and_does_no_harm(about: int, forger: int) -> None:
    """Member 5 is lost, so its mask key is recovered; of the others the seeds are."""
    held = draw(6, 3).share().mask({5})
    for i in sorted(held.tally.alive):
        shares = held.members[i].tell(*held.tally.asks(i))
        if i == forger:
            shares[about] = bytes(32)
        held.tally.took_shares(i, shares)
    # Six hold shares, of whom four are needed, and five told.
    values, _ = held.tally.open()
    np.testing.assert_array_equal(values, held.values[:5].sum(axis=0))
    assert held.tally.forgers == {forger}


@pytest.mark.parametrize(("byte", "bit"), [(0, 1), (0, 2), (0, 4), (31, 64), (31, 128)])
def test_a_key_with_other_ignored_bits_is_no_members_own(byte: int, bit: int) -> None:
    """A forged share could turn them, and honest shares would not fit the result."""
    private = PrivateKeys.generate().mask
    public = public_of(private)
    turned = bytearray(private)
    turned[byte] ^= bit
    assert public_of(bytes(turned)) == public
    assert is_private(private, public)
    assert not is_private(bytes(turned), public)


@pytest.mark.parametrize("about", [1, 3])
def test_too_many_forged_shares_are_noticed(about: int) -> None:
    held = draw(4, 3).share().mask({3})
    for i in sorted(held.tally.alive):
        shares = held.members[i].tell(*held.tally.asks(i))
        if i == 0:
            shares[about] = bytes(32)
        held.tally.took_shares(i, shares)
    with pytest.raises(SecureError, match=f"too many shares of member {about}'s"):
        held.tally.open()


def test_accomplices_of_a_server_that_lies_are_as_many_as_the_guide_says() -> None:
    """2t - h of the h holders of a secret: with three, one."""
    held = draw(3, 1).share().mask()
    needed = held.members[0].needed
    assert 2 * needed - 3 == 1
    seed = {0: held.members[0].tell([0, 1, 2], [])[0]}
    key = {1: held.members[1].tell([1, 2], [0])[0]}
    accomplice = held.members[2].held[0]
    assert join(seed | {2: accomplice[1]}, needed) == held.members[0].seed
    assert join(key | {2: accomplice[0]}, needed) == held.members[0].keys.mask


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (b"", "not 64 bytes"),
        (bytes(65), "not 64 bytes"),
        ("k" * 64, "not 64 bytes"),
        ([1] * 64, "not 64 bytes"),
        (7, "not 64 bytes"),
        (bytes(range(32)) * 2, "are one"),
        (bytes(range(32)) + bytes(32), "a public key is off"),
        (bytes(32) + bytes(range(32)), "a public key is off"),
    ],
)
def test_keys_that_no_honest_member_has_are_refused(keys: object, told: str) -> None:
    with pytest.raises(SecureError, match=told):
        PublicKeys.unpack(keys)


def test_shares_of_another_size_or_of_others_are_refused() -> None:
    held = draw(3, 3).share().mask()
    shares = held.members[0].tell(*held.tally.asks(0))
    for wrong in (shares | {1: b"short"}, {0: shares[0]}, shares | {9: bytes(32)}):
        with pytest.raises(SecureError, match=r"another size|not of those asked"):
            held.tally.took_shares(0, wrong)


@pytest.mark.parametrize("size", [0, 7, 21, 23, 10_000])
def test_another_ring_than_the_rounds_is_refused(size: int) -> None:
    held = draw(3, 3).share()
    with pytest.raises(SecureError, match="masked bytes, not 22"):
        held.tally.add(0, bytes(size))
    assert not held.tally.alive


def test_values_that_came_before_or_of_nobody_are_refused() -> None:
    held = draw(3, 3).share({2}).mask()
    for member in (0, 2):
        with pytest.raises(SecureError, match="came before"):
            held.tally.add(member, bytes(held.tally.size))


def test_letters_to_others_are_refused() -> None:
    held = draw(4, 3)
    letters = held.members[0].letters()
    for wrong in ({}, {1: letters[1]}, letters | {0: letters[1]}):
        with pytest.raises(SecureError, match="not to its neighbours"):
            held.tally.took_letters(0, wrong, b"")
    with pytest.raises(SecureError, match="another size"):
        held.tally.took_letters(0, letters | {1: b""}, b"")
    with pytest.raises(SecureError, match="its commitment has 0 bytes"):
        held.tally.took_letters(0, letters, b"")


def test_fewer_shares_than_needed_tell_nothing() -> None:
    """With one short of the needed, each value of a byte is as likely as another."""
    found = np.zeros(256, int)
    for _ in range(4096):
        first, second, _ = split(bytes(32), 3, 3)
        # The byte that a holder of two would get by the line through them.
        found[join({0: first, 1: second}, 2)[0]] += 1
    expected = 4096 / 256
    chi = ((found - expected) ** 2 / expected).sum()
    assert chi < 400  # 255 degrees of freedom; beyond it once in 10^8


def test_what_is_sealed_opens_with_its_key_and_label_alone() -> None:
    key = bytes(range(32))
    sealed = seal(b"plain", key, b"label")
    assert unseal(sealed, key, b"label") == b"plain"
    assert seal(b"plain", key, b"label") != sealed
    for other_key, label in ((bytes(32), b"label"), (key, b"other")):
        with pytest.raises(SecureError):
            unseal(sealed, other_key, label)
