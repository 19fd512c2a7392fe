//! The order of a chain's rules while its table is read: any place is found, filled and emptied fast.
//!
//! Lines put rules at either end, at a number, or take them away again, so that a plain vector would move the rest of
//! the chain for each. The rules are kept in blocks instead, and each rule's block is known, so that one can ask where a
//! rule stands as well as which rule stands somewhere. Rules go by their number in the table.

/// Most rules in a block.
const BLOCK: usize = 512;

/// Which block each rule of the table is in, by the block's own number in the rule's chain.
pub(crate) type Homes = Vec<u32>;

#[derive(Debug)]
struct Block {
    number: u32,
    rules: Vec<u32>,
}

/// The rules of one chain, in order.
#[derive(Debug, Default)]
pub(crate) struct Order {
    blocks: Vec<Block>,
    /// Where in `blocks` each block is, by its number.
    places: Vec<u32>,
    len: usize,
}

impl Order {
    /// How many rules there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The rules, first to last.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.iter_from(0)
    }

    /// The rules from a position on.
    pub(crate) fn iter_from(&self, position: usize) -> impl Iterator<Item = u32> {
        let (place, at) = if position < self.len { self.find(position) } else { (self.blocks.len(), 0) };
        self.blocks[place..].iter().flat_map(|block| block.rules.iter().copied()).skip(at)
    }

    /// Puts a rule at a position, of which there is one more than rules, before what is there.
    pub(crate) fn insert(&mut self, position: usize, rule: u32, homes: &mut Homes) {
        let (mut place, mut at) = match position {
            end if end == self.len => match self.blocks.last() {
                Some(last) => (self.blocks.len() - 1, last.rules.len()),
                None => (0, 0),
            },
            position => self.find(position),
        };
        if self.blocks.get(place).is_none_or(|block| block.rules.len() == BLOCK) {
            (place, at) = self.make_room(place, at, homes);
        }
        let block = &mut self.blocks[place];
        block.rules.insert(at, rule);
        self.len += 1;
        if homes.len() <= rule as usize {
            homes.resize(rule as usize + 1, u32::MAX);
        }
        homes[rule as usize] = block.number;
    }

    /// Takes the rule at a position away.
    pub(crate) fn remove(&mut self, position: usize) -> u32 {
        let (place, at) = self.find(position);
        let rule = self.blocks[place].rules.remove(at);
        if self.blocks[place].rules.is_empty() {
            self.blocks.remove(place);
            self.number_from(place);
        }
        self.len -= 1;
        rule
    }

    /// Where a rule of the chain stands. It compares as positions do.
    pub(crate) fn place(&self, rule: u32, homes: &Homes) -> (u32, usize) {
        let place = self.places[homes[rule as usize] as usize];
        let rules = &self.blocks[place as usize].rules;
        (place, rules.iter().position(|&there| there == rule).expect("a rule is at home"))
    }

    /// The position of a rule of the chain.
    pub(crate) fn position(&self, rule: u32, homes: &Homes) -> usize {
        let (place, at) = self.place(rule, homes);
        self.blocks[..place as usize].iter().map(|block| block.rules.len()).sum::<usize>() + at
    }

    /// The block and the place in it of the rule at a position.
    fn find(&self, position: usize) -> (usize, usize) {
        let mut at = position;
        for (place, block) in self.blocks.iter().enumerate() {
            match at.checked_sub(block.rules.len()) {
                Some(rest) => at = rest,
                None => return (place, at),
            }
        }
        panic!("the chain has a rule at {position}")
    }

    /// Makes a place next to a full block, or where there is no block yet: a block of its own at either end of the
    /// chain, where most lines put rules, and in between, half of the full one.
    fn make_room(&mut self, place: usize, at: usize, homes: &mut Homes) -> (usize, usize) {
        let number = self.places.len() as u32;
        self.places.push(0);
        let (new, rules, room) = if at == 0 {
            (place, Vec::new(), (place, 0))
        } else if at == BLOCK {
            (place + 1, Vec::new(), (place + 1, 0))
        } else {
            let rules = self.blocks[place].rules.split_off(BLOCK / 2);
            rules.iter().for_each(|&rule| homes[rule as usize] = number);
            let room = if at <= BLOCK / 2 { (place, at) } else { (place + 1, at - BLOCK / 2) };
            (place + 1, rules, room)
        };
        self.blocks.insert(new, Block { number, rules });
        self.number_from(new);
        room
    }

    /// Notes where the blocks from `place` on are.
    fn number_from(&mut self, place: usize) {
        for (place, block) in self.blocks.iter().enumerate().skip(place) {
            self.places[block.number as usize] = place as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_vector_that_knows_positions(
            steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..4_000)
        ) {
            let (mut order, mut homes, mut model) = (Order::default(), Homes::new(), Vec::new());
            // Enough at first that blocks split.
            for rule in 0..3 * BLOCK {
                order.insert(rule / 2, rule as u32, &mut homes);
                model.insert(rule / 2, rule as u32);
            }
            for (rule, (inserts, index)) in (3 * BLOCK..).zip(steps) {
                if inserts || model.is_empty() {
                    let position = index.index(model.len() + 1);
                    order.insert(position, rule as u32, &mut homes);
                    model.insert(position, rule as u32);
                } else {
                    let position = index.index(model.len());
                    prop_assert_eq!(order.remove(position), model.remove(position));
                }
                prop_assert_eq!(order.len(), model.len());
                if let Some(&some) = model.get(index.index(model.len().max(1))) {
                    prop_assert_eq!(model[order.position(some, &homes)], some);
                }
            }
            prop_assert_eq!(order.iter().collect::<Vec<_>>(), model);
        }
    }
}
