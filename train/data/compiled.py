"""The compiled loops of the generated tasks, and the random numbers that they draw.

They share one file because Numba's cache on disk looks at the file of a kernel alone: a change in another one that it
calls would go unnoticed. Random numbers are SplitMix64's ("Fast splittable pseudorandom number generators", OOPSLA
2014, figure 16), and all that depends on them is arithmetic of integers, so an example is the same on every machine.

Importing this module imports Numba.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from seqzoo.kernels.numba_runtime import function, kernel

GAMMA = np.uint64(0x9E3779B97F4A7C15)
DIGITS = 10
MIN, MAX, MED, SUM, CLOSE = 10, 11, 12, 13, 14
# the deepest tree and the most arguments for which the loops hold room
DEEPEST, WIDEST = 64, 10

# occupied is what is above 0.3; two paddles cross where their masks add up to 1.8: in 255ths
FREE, CROSSING = 76, 459
# weights of candidates are 255ths times 65536ths; what sums to less than 1e-4 is a dead end
DEAD_END = 1672
# draws of a place, and of a head; draws of a distractor
TRIES, DISTRACTOR_TRIES = 3, 5
# of the targets, before they are given up
ATTEMPTS = 1_000_000


@function
def _mixed(value):
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@function
def _begin(seed, index):
    """The state of the stream of an example."""
    state = np.empty(1, np.uint64)
    state[0] = _mixed(_mixed(seed + GAMMA) + _mixed(index * GAMMA + GAMMA))
    return state


@function
def _raw(state):
    state[0] += GAMMA
    return _mixed(state[0])


@function
def _below(state, count):
    """An integer from 0 to ``count - 1``, uniform but for 2^-32."""
    return np.int64(((_raw(state) >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32))


@function
def _grow(state, tokens, max_depth, max_args, longest):
    """Draws a tree in prefix order; returns its length, or 0 where it exceeds ``longest``."""
    missing = np.empty(DEEPEST, np.int64)
    depth, length = 0, 0
    while True:
        if length == longest:
            return 0
        # the root has depth 1: depth counts the operators that are open
        if depth + 1 < max_depth and _raw(state) >> np.uint64(62) == np.uint64(0):
            tokens[length] = MIN + _below(state, 4)
            missing[depth] = 2 + _below(state, max_args - 1)
            depth += 1
            length += 1
            continue
        tokens[length] = _below(state, DIGITS)
        length += 1
        while depth > 0:
            missing[depth - 1] -= 1
            if missing[depth - 1] > 0:
                break
            if length == longest:
                return 0
            tokens[length] = CLOSE
            length += 1
            depth -= 1
        if depth == 0:
            return length


@function
def _apply(operator, values, count):
    """The value of an operator; sorts ``values``."""
    if operator == SUM:
        return values[:count].sum() % DIGITS
    for place in range(1, count):
        value = values[place]
        while place > 0 and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value
    if operator == MIN:
        return values[0]
    if operator == MAX:
        return values[count - 1]
    return (values[(count - 1) // 2] + values[count // 2]) // 2


@function
def _value(tokens):
    """The value of an expression, or -1 where it is none: an operator has 2 to 10 arguments and a closing bracket."""
    operators = np.empty(DEEPEST, np.int64)
    counts = np.zeros(DEEPEST, np.int64)
    values = np.empty((DEEPEST, WIDEST), np.int64)
    depth = 0
    for place in range(tokens.size):
        token = np.int64(tokens[place])
        if MIN <= token <= SUM:
            if depth == DEEPEST:
                return -1
            operators[depth] = token
            counts[depth] = 0
            depth += 1
            continue
        if token == CLOSE:
            if depth == 0 or counts[depth - 1] < 2:
                return -1
            depth -= 1
            value = _apply(operators[depth], values[depth], counts[depth])
        elif token < DIGITS:
            value = token
        else:
            return -1
        if depth == 0:
            return value if place == tokens.size - 1 else -1
        if counts[depth - 1] == WIDEST:
            return -1
        values[depth - 1, counts[depth - 1]] = value
        counts[depth - 1] += 1
    return -1


@kernel
def _trees(seed, first, max_depth, max_args, shortest, longest, attempts, tokens, lengths):
    """The trees of so many indices; a length of 0 where none of the attempts gave one."""
    for row in prange(tokens.shape[0]):
        state = _begin(seed, first + np.uint64(row))
        lengths[row] = 0
        for _ in range(attempts):
            length = _grow(state, tokens[row], max_depth, max_args, longest)
            if length >= shortest:
                lengths[row] = length
                break


@kernel
def _values(tokens, bounds, values):
    for row in prange(values.size):
        values[row] = _value(tokens[bounds[row] : bounds[row + 1]])


@kernel
def _value_counts(tokens, bounds, counts):
    """How often an operator at a depth, the root's being 1, has a value: into ``(tasks, depths, 4, 10)``."""
    tasks = counts.shape[0]
    for task in prange(tasks):
        operators = np.empty(DEEPEST, np.int64)
        filled = np.zeros(DEEPEST, np.int64)
        values = np.empty((DEEPEST, WIDEST), np.int64)
        for row in range(task, bounds.size - 1, tasks):
            depth = 0
            for place in range(bounds[row], bounds[row + 1]):
                token = np.int64(tokens[place])
                if MIN <= token <= SUM:
                    operators[depth] = token
                    filled[depth] = 0
                    depth += 1
                    continue
                value = token
                if token == CLOSE:
                    depth -= 1
                    value = _apply(operators[depth], values[depth], filled[depth])
                    counts[task, depth, operators[depth] - MIN, value] += 1
                if depth > 0:
                    values[depth - 1, filled[depth - 1]] = value
                    filled[depth - 1] += 1


@function
def _exactly(shares, count, chosen):
    """The chance that exactly ``chosen`` of independent events happen and every other one's rest does.

    ``shares[i]`` holds the chances of the event and of the rest, which need not sum to 1.
    """
    chances = np.zeros(WIDEST + 1)
    chances[0] = 1.0
    for place in range(count):
        for happened in range(place + 1, 0, -1):
            chances[happened] = chances[happened] * shares[place, 1] + chances[happened - 1] * shares[place, 0]
        chances[0] *= shares[place, 1]
    return chances[chosen]


@function
def _middle_below(parts, count, low, high):
    """The chance that the lower of the two middle values is at most ``low`` and the upper at most ``high``."""
    half = count // 2
    # (at most low, above low and at most high, above high) for each: counted jointly
    chances = np.zeros((WIDEST + 1, WIDEST + 1))
    chances[0, 0] = 1.0
    for place in range(count):
        first, second, third = 0.0, 0.0, 0.0
        for value in range(DIGITS):
            if value <= low:
                first += parts[place, value]
            elif value <= high:
                second += parts[place, value]
            else:
                third += parts[place, value]
        for one in range(place + 1, -1, -1):
            for two in range(place + 1 - one, -1, -1):
                chance = chances[one, two] * third
                if one > 0:
                    chance += chances[one - 1, two] * first
                if two > 0:
                    chance += chances[one, two - 1] * second
                chances[one, two] = chance
    total = 0.0
    for one in range(half, count + 1):
        for two in range(count + 1 - one):
            if one + two >= half + 1:
                total += chances[one, two]
    return total


@function
def _median(parts, count, out):
    if count % 2:
        shares = np.empty((WIDEST, 2))
        before = 0.0
        for value in range(DIGITS):
            for place in range(count):
                shares[place, 0] = parts[place, : value + 1].sum()
                shares[place, 1] = parts[place, value + 1 :].sum()
            at_most = 0.0
            for chosen in range(count // 2 + 1, count + 1):
                at_most += _exactly(shares, count, chosen)
            out[value] = at_most - before
            before = at_most
        return
    table = np.zeros((DIGITS + 1, DIGITS + 1))
    for low in range(DIGITS):
        for high in range(low, DIGITS):
            table[low + 1, high + 1] = _middle_below(parts, count, low, high)
        # the upper one is at least the lower: where low exceeds high it is high that counts
        for high in range(low):
            table[low + 1, high + 1] = table[high + 1, high + 1]
    for low in range(DIGITS):
        for high in range(low, DIGITS):
            chance = table[low + 1, high + 1] - table[low, high + 1] - table[low + 1, high] + table[low, high]
            out[(low + high) // 2] += chance


@function
def _distribution(operator, parts, count, out):
    """The distribution of an operator's value, of those of its independent arguments ``(count, 10)``."""
    out[:] = 0.0
    if operator == SUM:
        out[0] = 1.0
        for place in range(count):
            before = out.copy()
            out[:] = 0.0
            for total in range(DIGITS):
                for value in range(DIGITS):
                    out[(total + value) % DIGITS] += before[total] * parts[place, value]
    elif operator == MED:
        _median(parts, count, out)
    else:
        before = 0.0
        for step in range(DIGITS):
            inside = 1.0
            for place in range(count):
                inside *= parts[place, : step + 1].sum() if operator == MAX else parts[place, DIGITS - 1 - step :].sum()
            out[step if operator == MAX else DIGITS - 1 - step] = inside - before
            before = inside


@kernel
def _likeliest(tokens, bounds, table, levels, answers):
    """The likeliest value of each tree, of which operators below so many levels are known by their name alone."""
    for row in prange(answers.size):
        operators = np.empty(DEEPEST, np.int64)
        filled = np.zeros(DEEPEST, np.int64)
        parts = np.zeros((DEEPEST, WIDEST, DIGITS))
        result = np.zeros(DIGITS)
        depth = 0
        for place in range(bounds[row], bounds[row + 1]):
            token = np.int64(tokens[place])
            if MIN <= token <= SUM:
                operators[depth] = token
                filled[depth] = 0
                depth += 1
                continue
            result[:] = 0.0
            if token == CLOSE:
                depth -= 1
                if depth == levels:
                    result[:] = table[depth, operators[depth] - MIN]
                elif depth < levels:
                    _distribution(operators[depth], parts[depth], filled[depth], result)
            else:
                result[token] = 1.0
            if depth > 0:
                parts[depth - 1, filled[depth - 1]] = result
                filled[depth - 1] += 1
        answers[row] = result.argmax()


@function
def _add_to_image(image, stamp, half, row, column, contrast):
    """Brings a stamp's ink into the image by the greater of the two."""
    size = image.shape[0]
    for y in range(max(row - half, 0), min(row + half + 1, size)):
        for x in range(max(column - half, 0), min(column + half + 1, size)):
            image[y, x] = max(image[y, x], np.int64(stamp[y - row + half, x - column + half]) * contrast)


@function
def _add_to_occupied(occupied, stamp, half, row, column):
    size = occupied.shape[0]
    for y in range(max(row - half, 0), min(row + half + 1, size)):
        for x in range(max(column - half, 0), min(column + half + 1, size)):
            occupied[y, x] = max(occupied[y, x], stamp[y - row + half, x - column + half])


@function
def _crosses(occupied, stamp, half, row, column):
    size = occupied.shape[0]
    for y in range(max(row - half, 0), min(row + half + 1, size)):
        for x in range(max(column - half, 0), min(column + half + 1, size)):
            if np.int64(occupied[y, x]) + np.int64(stamp[y - row + half, x - column + half]) >= CROSSING:
                return True
    return False


@function
def _inside(row, column, size):
    return 0 <= row < size and 0 <= column < size


@function
def _extend(state, occupied, snake, geometry, masks, steps, circle, weights):
    """Draws the next paddle of a snake.

    ``snake`` is (pivot row, pivot column, orientation, stamp, stamp's row, stamp's column); an orientation from 360 on
    is that of a candidate, and so is a stamp. Returns whether there was a place, after which the snake is the longer
    one and ``occupied`` holds the paddle before.
    """
    size, half, margin, candidates = occupied.shape[0], geometry[0], geometry[1], geometry[2]
    orientation = snake[2]
    row, column = snake[0] + steps[orientation, 0], snake[1] + steps[orientation, 1]
    cumulated = np.empty(candidates, np.int64)
    total = 0
    for candidate in range(candidates):
        y, x = row + circle[candidate, 0], column + circle[candidate, 1]
        if _inside(y, x, size):
            taken = 0
            for dy in range(-margin, margin + 1):
                for dx in range(-margin, margin + 1):
                    if dy * dy + dx * dx <= margin * margin and _inside(y + dy, x + dx, size):
                        taken = max(taken, np.int64(occupied[y + dy, x + dx]))
            total += (255 - taken) * weights[orientation, candidate]
        cumulated[candidate] = total
    if total < DEAD_END:
        return False
    for _ in range(TRIES):
        drawn = _below(state, total)
        chosen = 0
        while cumulated[chosen] <= drawn:
            chosen += 1
        y, x = row + circle[chosen, 0], column + circle[chosen, 1]
        if not _crosses(occupied, masks[360 + chosen], half, y, x):
            _add_to_occupied(occupied, masks[snake[3]], half, snake[4], snake[5])
            snake[:] = (row, column, 360 + chosen, 360 + chosen, y, x)
            return True
    return False


@function
def _seed_at(snake, row, column, degree, seeds, size):
    """Lays the first paddle's tip at a place; returns whether its head and its pivot lie inside."""
    pivot_row, pivot_column = row + seeds[degree, 2], column + seeds[degree, 3]
    if not _inside(row + seeds[degree, 0], column + seeds[degree, 1], size):
        return False
    snake[:] = (pivot_row, pivot_column, degree, degree, row, column)
    return _inside(pivot_row, pivot_column, size)


@function
def _fits(occupied, row, column, core, cores):
    size = occupied.shape[0]
    for place in range(cores):
        y, x = row + core[place, 0], column + core[place, 1]
        # the border counts as occupied, and what is beyond it too
        if not (0 < y < size - 1 and 0 < x < size - 1) or occupied[y, x] > FREE:
            return False
    return True


@function
def _free_place(state, occupied, core, cores, place):
    """A uniform place among those where the middle of a paddle's mask meets nothing; returns whether there is one."""
    size, count = occupied.shape[0], 0
    for row in range(size):
        for column in range(size):
            count += _fits(occupied, row, column, core, cores)
    if count == 0:
        return False
    left = _below(state, count)
    for row in range(size):
        for column in range(size):
            if _fits(occupied, row, column, core, cores):
                if left == 0:
                    place[:] = (row, column)
                    return True
                left -= 1
    return False


@function
def _two_seeds(state, snakes, size, band, seeds, core, cores, allowed, around):
    """Lays the first paddles of both snakes; returns whether there was room."""
    found = False
    for _ in range(TRIES):
        degree = _below(state, 360)
        if not allowed[degree]:
            return False
        # all is free but the band, so the places form a rectangle
        places = core[degree, : cores[degree]]
        top, left = places[:, 0].min(), places[:, 1].min()
        rows = size - 2 * band - (places[:, 0].max() - top)
        columns = size - 2 * band - (places[:, 1].max() - left)
        if rows <= 0 or columns <= 0:
            return False
        row, column = band - top + _below(state, rows), band - left + _below(state, columns)
        if _seed_at(snakes[0], row, column, degree, seeds, size):
            found = True
            break
    if not found:
        return False
    for _ in range(TRIES):
        degree, angle = _below(state, 360), _below(state, 360)
        row, column = snakes[0, 4] + around[angle, 0], snakes[0, 5] + around[angle, 1]
        if _seed_at(snakes[1], row, column, degree, seeds, size):
            return True
    return False


@function
def _targets(state, image, occupied, snakes, tips, plan, geometry, contrast, tables):
    """Draws two snakes into an empty image; returns whether they came to their full length."""
    size, padding = image.shape[0], plan[0]
    inks, masks, seeds, steps, circle, weights, core, cores, allowed, around = tables
    image[:] = 0
    occupied[:] = 255
    occupied[padding : size - padding, padding : size - padding] = 0
    if not _two_seeds(state, snakes, size, plan[1], seeds, core, cores, allowed, around):
        return False
    tips[:2] = snakes[:, 4:]
    for snake in snakes:
        _add_to_image(image, inks[snake[3]], geometry[0], snake[4], snake[5], contrast)
    for _ in range(plan[2] - 1):
        for snake in snakes:
            if not _extend(state, occupied, snake, geometry, masks, steps, circle, weights):
                return False
            _add_to_image(image, inks[snake[3]], geometry[0], snake[4], snake[5], contrast)
    tips[2:] = snakes[:, 4:]
    _add_to_occupied(occupied, masks[snakes[1, 3]], geometry[0], snakes[1, 4], snakes[1, 5])
    return True


@function
def _distractor(state, image, occupied, snake, length, geometry, contrast, tables):
    """Draws one short snake wherever there is room; returns whether it came to its full length."""
    size = image.shape[0]
    inks, masks, seeds, steps, circle, weights, core, cores, allowed, _ = tables
    place = np.empty(2, np.int64)
    found = False
    for _ in range(TRIES):
        degree = _below(state, 360)
        if not allowed[degree] or not _free_place(state, occupied, core[degree], cores[degree], place):
            return False
        if _seed_at(snake, place[0], place[1], degree, seeds, size):
            found = True
            break
    if not found:
        return False
    _add_to_image(image, inks[snake[3]], geometry[0], snake[4], snake[5], contrast)
    for _ in range(length - 1):
        if not _extend(state, occupied, snake, geometry, masks, steps, circle, weights):
            return False
        _add_to_image(image, inks[snake[3]], geometry[0], snake[4], snake[5], contrast)
    _add_to_occupied(occupied, masks[snake[3]], geometry[0], snake[4], snake[5])
    return True


@kernel
def _pathfinder(
    seed,
    first,
    plan,
    contrasts,
    geometries,
    inks,
    masks,
    seeds,
    steps,
    circles,
    weights,
    core,
    cores,
    allowed,
    around,
    marker,
    images,
    facts,
):
    """Draws the images of so many indices.

    ``plan`` is (padding, width of the band, paddles of a target, of a distractor, distractors); ``facts`` becomes
    (label, distractors drawn, attempts at the targets, rows and columns of the two marks). All tables have one entry a
    margin first.
    """
    for index in prange(images.shape[0]):
        size = images.shape[1]
        state = _begin(seed, first + np.uint64(index))
        label, variant = _below(state, 2), _below(state, geometries.shape[0])
        geometry = geometries[variant]
        tables = (
            inks[variant],
            masks[variant],
            seeds[variant],
            steps[variant],
            circles[variant],
            weights[variant],
            core[variant],
            cores[variant],
            allowed[variant],
            around,
        )
        image = np.empty((size, size), np.int64)
        occupied = np.empty((size, size), np.uint8)
        snakes = np.zeros((2, 6), np.int64)
        tips = np.zeros((4, 2), np.int64)
        attempts = 1
        while not _targets(state, image, occupied, snakes, tips, plan, geometry, contrasts[0], tables):
            attempts += 1
            if attempts > ATTEMPTS:
                break
        drawn = 0
        for _ in range(plan[4]):
            for _ in range(DISTRACTOR_TRIES):
                before, taken = image.copy(), occupied.copy()
                if _distractor(state, image, occupied, snakes[0], plan[3], geometry, contrasts[1], tables):
                    drawn += 1
                    break
                image, occupied = before, taken
        origin = _below(state, 2)
        terminal = 2 + (origin if label == 1 else 1 - origin)
        for tip in (origin, terminal):
            _add_to_image(image, marker, marker.shape[0] // 2, tips[tip, 0], tips[tip, 1], contrasts[2])
        low, high = image.min(), image.max()
        for row in range(size):
            for column in range(size):
                images[index, row, column] = ((image[row, column] - low) * 510 + high - low) // (2 * (high - low))
        facts[index] = (label, drawn, attempts, tips[origin, 0], tips[origin, 1], tips[terminal, 0], tips[terminal, 1])
