//! A doubly linked list over the integers `0..capacity`, each of which is in it at most once.
//!
//! Every operation is O(1), removal from the middle included: that is what a free list with cache
//! hits and queues with aborts need. The links live in one array; entry 0 is the anchor that closes
//! the ring, so that no operation has a special case at the ends.

/// The links of one item. An item that is in no list links to itself.
#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

/// The list. Item `i` has its links at `i + 1`.
#[derive(Debug)]
pub(crate) struct IndexList {
    links: Vec<Link>,
    len: usize,
}

const ANCHOR: u32 = 0;

impl IndexList {
    /// An empty list of the items `0..capacity`.
    pub(crate) fn new(capacity: usize) -> Self {
        let mut list = Self { links: vec![Link { previous: ANCHOR, next: ANCHOR }], len: 0 };
        list.grow(capacity);
        list
    }

    /// Makes room for the items `0..capacity`; keeps the order.
    pub(crate) fn grow(&mut self, capacity: usize) {
        for at in self.links.len()..=capacity {
            let at = u32::try_from(at).expect("items are at most u32::MAX - 1");
            self.links.push(Link { previous: at, next: at });
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, item: u32) -> bool {
        self.links[item as usize + 1].next != item + 1
    }

    pub(crate) fn first(&self) -> Option<u32> {
        self.links[ANCHOR as usize].next.checked_sub(1)
    }

    pub(crate) fn last(&self) -> Option<u32> {
        self.links[ANCHOR as usize].previous.checked_sub(1)
    }

    /// The item behind `item`, which is in the list.
    pub(crate) fn next(&self, item: u32) -> Option<u32> {
        self.links[item as usize + 1].next.checked_sub(1)
    }

    pub(crate) fn push_front(&mut self, item: u32) {
        self.insert_behind(ANCHOR, item + 1);
    }

    pub(crate) fn push_back(&mut self, item: u32) {
        self.insert_behind(self.links[ANCHOR as usize].previous, item + 1);
    }

    pub(crate) fn remove(&mut self, item: u32) {
        assert!(self.contains(item), "item {item} is not in the list");
        let at = item + 1;
        let Link { previous, next } = self.links[at as usize];
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.links[at as usize] = Link { previous: at, next: at };
        self.len -= 1;
    }

    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let item = self.first()?;
        self.remove(item);
        Some(item)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.first(), |&item| self.next(item))
    }

    fn insert_behind(&mut self, previous: u32, at: u32) {
        assert!(!self.contains(at - 1), "item {} is in the list already", at - 1);
        let next = self.links[previous as usize].next;
        self.links[at as usize] = Link { previous, next };
        self.links[previous as usize].next = at;
        self.links[next as usize].previous = at;
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(list: &IndexList) -> Vec<u32> {
        list.iter().collect()
    }

    #[test]
    fn pushes_at_both_ends_and_removes_anywhere() {
        let mut list = IndexList::new(5);
        assert_eq!((list.first(), list.last(), list.len()), (None, None, 0));
        list.push_back(3);
        list.push_back(0);
        list.push_front(4);
        list.push_back(1);
        assert_eq!(items(&list), [4, 3, 0, 1]);
        list.remove(0);
        assert!(!list.contains(0) && list.contains(3));
        assert_eq!(items(&list), [4, 3, 1]);
        assert_eq!((list.first(), list.last(), list.len()), (Some(4), Some(1), 3));
        assert_eq!(list.pop_front(), Some(4));
        list.remove(1);
        assert_eq!(list.pop_front(), Some(3));
        assert_eq!(list.pop_front(), None);
    }

    #[test]
    fn a_list_of_one_item_contains_it() {
        let mut list = IndexList::new(1);
        list.push_back(0);
        assert!(list.contains(0));
        list.grow(3);
        list.push_front(2);
        assert_eq!(items(&list), [2, 0]);
    }

    #[test]
    #[should_panic(expected = "item 1 is in the list already")]
    fn an_item_cannot_be_in_the_list_twice() {
        let mut list = IndexList::new(2);
        list.push_back(1);
        list.push_back(1);
    }
}
