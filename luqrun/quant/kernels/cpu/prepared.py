"""Loops that run over and over on other tensors, told what they are told once."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luqrun.quant.kernels.cpu import driver
from luqrun.quant.kernels.cpu.sizes import APART


@dataclass(frozen=True)
class Place:
    """An address that a call brings: so many bytes after the one of this name."""

    name: str
    offset: int = 0

    def __add__(self, offset: int) -> Place:
        return Place(self.name, self.offset + offset)


class Room:
    """Pieces of the memory of one name, one after the other."""

    def __init__(self, name: str):
        self.name, self.bytes = name, 0

    def take(self, size: int) -> Place:
        place = Place(self.name, self.bytes)
        self.bytes += -(-size // APART) * APART
        return place


class Prepared:
    """Loops over tasks, which run as driver.in_turn runs them. Their numbers may be places."""

    def __init__(self, loops: Sequence[driver.Loop], elements: int):
        """elements: of the largest tensor that a loop itself divides among threads."""
        self.count, self.told, self.places = len(loops), array("q"), []
        self.elements = max(elements, *(each[2] for each in loops))
        for loop in loops:
            for number in driver.told_of(*loop):
                if isinstance(number, Place):
                    self.places.append((len(self.told), number.name, number.offset))
                self.told.append(0 if isinstance(number, Place) else number)

    def run(self, addresses: Mapping[str, int]) -> None:
        driver.team(self.elements)  # numba is told how many threads there are before each call
        told = self.told[:]
        for at, name, offset in self.places:
            told[at] = addresses[name] + offset
        driver.follow(self.count, told.buffer_info()[0])
